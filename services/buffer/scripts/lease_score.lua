-- ARGV[1]: {replica_id, max_samples, payload}. Blobs: per group its prompt, then per sample '', payload.
local owner, left, payload = unpack(cmsgpack.unpack(ARGV[1]))
take_back_expired(SCORE)
reindex()
local leased, blobs = {}, {}
for _, m in ipairs(listed('scorable', left)) do
  if left == 0 then break end
  left = left - take(group(tonumber(m)), SCORE, GENERATED, SCORING, owner, left, leased, blobs, payload)
end
local waiting = #leased == 0 and why_no_score() or {}
return answer({ leased, waiting, closed_groups, 0, {} }, blobs)
