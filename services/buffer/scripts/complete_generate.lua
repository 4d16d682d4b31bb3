-- ARGV[1]: rows {order, index, lease, num_tokens, completion_tokens, finish_reason, versions, digests of blobs}; ARGV[k + 1]: payloads.
return each_sample(function(row, k)
  local order, index, lease, num_tokens, completion_tokens, finish_reason, versions, digests = unpack(row)
  local g, i, s = sample_at(order, index)
  if s and s[GENERATE_LEASE] == lease then return DUPLICATE end
  local saved = s and s[SAVED] or 0
  local refused = lost(g, s, lease, GENERATING)
  if refused then
    bump('tokens_discarded', completion_tokens - saved)
    bump('tokens_discarded.completed_late', completion_tokens - saved)
    return refused
  end
  bump('tokens_generated', completion_tokens - saved)
  end_lease(g, i)
  if saved > 0 then call('UNLINK', partial_key(g, i)) end
  call('HSET', P .. 'p:' .. order, 's' .. index, ARGV[k + 1])
  s[STATE], s[GENERATE_LEASE], s[ATTEMPT], s[LOST], s[SAVED] = GENERATED, lease, 0, 0, 0
  s[TOKENS], s[COMPLETION], s[FINISH], s[VERSIONS] = num_tokens, completion_tokens, finish_reason, versions
  refer_to_blobs(s, digests)
  -- Tokens older than the group's birth bring its deadline forward.
  local oldest = tokens_effective(s)
  if oldest and oldest < effective(g.birth_epoch, g.birth_step) then
    call('ZADD', P .. 'live', 'XX', group_effective(g), member(order))
  end
  touch(g)
  return OK
end)
