-- ARGV[1]: rows {order, index, lease, state, reason, drop_reason, error, tokens_discarded, counter of these tokens};
-- `state` is the leased one.
local SAMPLE_ERROR, FATAL, DROP = 3, 4, 5
return each_sample(function(row)
  local order, index, lease, state, reason, drop_reason, message, tokens_discarded, discarded_as = unpack(row)
  local g, i, s = sample_at(order, index)
  if s and s[RELEASED_LEASE] == lease then return DUPLICATE end
  local refused = lost(g, s, lease, state)
  if refused then return refused end
  s[RELEASED_LEASE] = lease
  bump('tokens_discarded', tokens_discarded)
  bump(discarded_as, tokens_discarded)
  if reason == DROP then
    drop(g, drop_reason)
  elseif reason == FATAL then
    kill(g, i, message)
  elseif reason == SAMPLE_ERROR then
    count_failure(g, i, message)
  else
    give_back(g, i)
  end
  return OK
end)
