-- ARGV[1]: {prompts, {{order, index}, ...}}. Blobs: per sample partial, payload, score, and when `prompts` are wanted that
-- of a sample without payload.
local prompts, refs = unpack(cmsgpack.unpack(ARGV[1]))
local states, blobs = {}, {}
for k, ref in ipairs(refs) do
  local order, i = ref[1], ref[2] + 1
  local g = group(order)
  local s = g and g.samples[i]
  local stored = s and call('HMGET', P .. 'p:' .. order, 's' .. ref[2], 'v' .. ref[2]) or {}
  states[k] = s and s[STATE] or 0
  blobs[#blobs + 1] = s and s[SAVED] > 0 and call('GET', partial_key(g, i)) or ''
  blobs[#blobs + 1] = stored[1] or ''
  blobs[#blobs + 1] = stored[2] or ''
  blobs[#blobs + 1] = s and prompts and not stored[1] and call('HGET', P .. 'p:' .. order, 'prompt') or ''
end
return answer(states, blobs)
