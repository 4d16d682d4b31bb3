-- ARGV[1]: {cursor, ordinals}; ARGV[2..]: prompts. Compare-and-set on the prompt cursor.
local cursor, ordinals = unpack(cmsgpack.unpack(ARGV[1]))
if cursor ~= M.cursor or #ordinals == 0 then return answer({ 0 }) end
for k, ordinal in ipairs(ordinals) do new_group(ordinal, ARGV[k + 1]) end
M.cursor = ordinals[#ordinals] + 1
return answer({ #ordinals })
