-- ARGV[1]: {replica_id, max_samples, payload, request_id, max_bytes}. Blobs: per group its prompt, then per sample '',
-- payload; in a group to be judged per sample payload, score. Answers last whether something is left over.
local owner, left, payload, request_id, most = unpack(cmsgpack.unpack(ARGV[1]))
take_back_expired(SCORE)
reindex()
local out = new_handout(SCORE, owner, left, most, payload)
if not put_again(out, request_id) then
  for _, m in ipairs(listed('scorable', left)) do
    if out.left == 0 or out.full then break end
    local g = group(tonumber(m))
    if judgeable(g) then
      take_whole(out, g)
    elseif not M.scored_whole then
      take(out, g, GENERATED)
    elseif may_be_scored(g) then
      take_together(out, g)
    end
  end
  remember(out, request_id, false)
end
reindex()
local left_over = call('ZCARD', P .. 'scorable') > 0
local waiting = #out.groups == 0 and why_no_score() or {}
return answer({ out.groups, waiting, closed_groups, 0, {}, left_over }, out.blobs)
