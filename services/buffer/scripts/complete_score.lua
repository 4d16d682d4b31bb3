-- ARGV[1]: rows {order, index, lease, reward, verdict, reason}; ARGV[k + 1]: serialized scores. A verdict other than 0 is
-- on the whole group of a sample that was leased to be judged.
local DROP, KEEP_IF_INSUFFICIENT = 2, 3
local KEPT = { 'filter.kept', '', 'filter.kept_when_insufficient', 'filter.failed' }
local KEPT_REASONS = 64

local function reason_counter(reason)
  local name, known = 'filter.drop_' .. reason, 0
  if M.counters[name] then return name end
  for counter in pairs(M.counters) do
    if string.sub(counter, 1, 12) == 'filter.drop_' then known = known + 1 end
  end
  return known < KEPT_REASONS and name or 'filter.drop_other'
end

local function judge(g, verdict, reason)
  g.judged = true
  for i, s in ipairs(g.samples) do
    if s[STATE] ~= DEAD then
      end_lease(g, i)
      s[STATE], s[ATTEMPT], s[LOST] = SCORED, 0, 0
    end
  end
  touch(g)
  if verdict == DROP or (verdict == KEEP_IF_INSUFFICIENT and M.filtered < M.refill_groups) then
    return reject(g, FILTERED, reason_counter(reason))
  end
  bump(KEPT[verdict], 1)
  finish(g)
end

return each_sample(function(row, k)
  local order, index, lease, reward, verdict, reason = unpack(row)
  local g, i, s = sample_at(order, index)
  if s and (s[SCORE_LEASE] == lease or (g.judged and s[LEASE] == lease)) then return DUPLICATE end
  local refused = lost(g, s, lease, SCORING)
  if refused then return refused end
  if (verdict > 0) ~= (s[SCORE_LEASE] > 0) then return LEASE_LOST end
  if verdict > 0 then
    judge(g, verdict, reason)
    return OK
  end
  end_lease(g, i)
  call('HSET', P .. 'p:' .. order, 'v' .. index, ARGV[k + 1])
  s[STATE], s[SCORE_LEASE], s[ATTEMPT], s[LOST], s[REWARD] = SCORED, lease, 0, 0, reward
  touch(g)
  finish(g)
  return OK
end)
