-- ARGV[1]: rows {order, index, lease, from_token, num_tokens}; ARGV[k + 1]: the framed delta of row k, or ''.
return each_sample(function(row, k)
  local order, index, lease, from_token, num_tokens = unpack(row)
  local g, i, s = sample_at(order, index)
  local refused = lost(g, s, lease, GENERATING, SCORING)
  if refused then return refused end
  call('ZADD', P .. 'lease:' .. (s[STATE] == GENERATING and GENERATE or SCORE), now + M.lease_ttl_ms, serial(g, i))
  if s[APPENDED_FROM] == NEVER_EXTENDED then
    s[APPENDED_FROM], s[LOST] = NOTHING_APPENDED, 0
    touch(g)
  end
  if num_tokens == 0 then return OK end
  if s[STATE] ~= GENERATING then return LEASE_LOST end
  if from_token == s[APPENDED_FROM] and from_token + num_tokens == s[SAVED] then return DUPLICATE, s[SAVED] end
  if from_token ~= s[SAVED] then return CONFLICT, s[SAVED] end
  call('APPEND', partial_key(g, i), ARGV[k + 1])
  s[APPENDED_FROM], s[SAVED], s[ATTEMPT] = s[SAVED], s[SAVED] + num_tokens, 0
  bump('tokens_generated', num_tokens)
  touch(g)
  return OK, s[SAVED]
end)
