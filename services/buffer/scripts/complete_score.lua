-- ARGV[1]: rows {order, index, lease, reward}; ARGV[k + 1]: serialized scores.
return each_sample(function(row, k)
  local order, index, lease, reward = unpack(row)
  local g, i, s = sample_at(order, index)
  if s and s[SCORE_LEASE] == lease then return DUPLICATE end
  local refused = lost(g, s, lease, SCORING)
  if refused then return refused end
  end_lease(g, i)
  call('HSET', P .. 'p:' .. order, 'v' .. index, ARGV[k + 1])
  s[STATE], s[SCORE_LEASE], s[ATTEMPT], s[LOST], s[REWARD] = SCORED, lease, 0, 0, reward
  touch(g)
  finish(g)
  return OK
end)
