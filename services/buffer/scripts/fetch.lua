-- ARGV[1]: {{order, index}, ...}. Blobs: per sample partial, payload, score.
local states, blobs = {}, {}
for k, ref in ipairs(cmsgpack.unpack(ARGV[1])) do
  local order, i = ref[1], ref[2] + 1
  local g = group(order)
  local s = g and g.samples[i]
  local stored = s and call('HMGET', P .. 'p:' .. order, 's' .. ref[2], 'v' .. ref[2]) or {}
  states[k] = s and s[STATE] or 0
  blobs[#blobs + 1] = s and s[SAVED] > 0 and call('GET', partial_key(g, i)) or ''
  blobs[#blobs + 1] = stored[1] or ''
  blobs[#blobs + 1] = stored[2] or ''
end
return answer(states, blobs)
