-- ARGV[1]: {{order, index}, ...}. Answers {outcome, order of the group it goes on in or -1} for each.
local function requeue_in_group(g, i)
  local s = g.samples[i]
  tally('dead', g, i, false)
  call('ZREM', P .. 'dead', serial(g, i))
  call('HDEL', P .. 'letters', serial(g, i))
  s[STATE], s[ATTEMPT], s[SAVED], s[LOST], s[REQUEUED] = PENDING, 0, 0, 0, 1
  s[TOKENS], s[COMPLETION], s[FINISH], s[VERSIONS], s[REWARD] = 0, 0, 0, {}, 0
  call('ZADD', P .. 'live', 'XX', group_effective(g), member(g.order))
  touch(g)
  return g.order
end

local function reissue(g)
  g.reissued_as = new_group(-1, call('HGET', P .. 'p:' .. g.order, 'prompt'))
  forget_prompt(g)
  return g.reissued_as
end

local results = {}
for k, ref in ipairs(cmsgpack.unpack(ARGV[1])) do
  local outcome = requeue_outcome(ref[1], ref[2])
  local g, goes_on = group(ref[1]), -1
  if outcome == REQUEUED_IN_GROUP then
    goes_on = requeue_in_group(g, ref[2] + 1)
  elseif outcome == REISSUED_GROUP then
    goes_on = reissue(g)
  elseif outcome == REQUEUED_BEFORE then
    goes_on = g.reissued_as or g.order
  end
  if outcome <= REISSUED_GROUP then bump('samples_requeued', 1) end
  results[k] = { outcome, goes_on }
end
return answer(results)
