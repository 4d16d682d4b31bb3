-- ARGV[1]: {max_groups}. Waiting groups that have tokens. Blobs: per group its prompt, then per sample '', score.
local most = cmsgpack.unpack(ARGV[1])[1]
local rows, blobs = {}, {}

local function has_tokens(g)
  for _, s in ipairs(g.samples) do
    if s[STATE] ~= DEAD and length(s) > 0 then return true end
  end
end

for _, m in ipairs(call('ZRANGE', P .. 'pending', 0, -1)) do
  if #rows >= most then break end
  local g = group(tonumber(m))
  if has_tokens(g) then
    local samples = {}
    blobs[#blobs + 1] = call('HGET', P .. 'p:' .. g.order, 'prompt') or ''
    for i, s in ipairs(g.samples) do
      if s[STATE] ~= DEAD then
        local record = facts(s)
        -- Unfinished tokens are as old as the group's birth.
        if record[4] == 0 and length(s) > 0 then record[4], record[5] = g.birth_epoch, g.birth_step end
        samples[#samples + 1] = { i - 1, 0, s[ATTEMPT], record }
        blobs[#blobs + 1] = ''
        blobs[#blobs + 1] = s[SCORE_LEASE] > 0 and call('HGET', P .. 'p:' .. g.order, 'v' .. (i - 1)) or ''
      end
    end
    rows[#rows + 1] = { g.order, g.ordinal, 0, samples }
  end
end
return answer(rows, blobs)
