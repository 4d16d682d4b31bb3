-- What every script shares. It stands before each of them when they are loaded.
--
-- One record per run (M) and one per group are read, changed in memory and written once, at the end. KEYS[1] is the
-- run's prefix "{name}:". Every other key is made of it and of numbers, so that all have the same hash tag:
--   meta          the run (msgpack)                  g:<order>          a group and its samples (msgpack)
--   p:<order>     prompt, payloads, scores (hash)    d:<order>:<index>  partial sample (append-only string)
--   batch:<step>  groups a step was leased with      b:<state>          bitmap of samples in a closed state
--   preferred     groups to be leased before others
--   fresh         groups never leased                pending, scorable  live groups that have such samples
--   live, ready   live groups by effective step      bound              groups to be replayed, by step
--   rejected      groups that a filter rejected and    places             places of the open groups that were issued
--                 that may not have had their turn,                       again, by order
--                 by effective step
--   lease:<stage> leased samples by deadline (ms)    closed             closed ordinals by step
--   replicas      registered replicas by id          grants             last lease by stage and replica
--   submits       orders by request id               submit_ids         those ids, oldest first
--   blobs         references by digest               writes             how many calls have changed something
--   dead          dead samples by order of death     letters            how they died (msgpack)
-- Groups are members as 12 digits, so that equal scores sort by order.
local P = KEYS[1]
local call = redis.call

-- SampleState
local PENDING, GENERATING, GENERATED, SCORING, SCORED, READY = 1, 2, 3, 4, 5, 6
local TRAINING, CONSUMED, RETIRED, DROPPED, DEAD = 7, 8, 9, 10, 11
-- Stage
local GENERATE, SCORE, TRAIN = 1, 2, 3
-- Outcome
local OK, DUPLICATE, LEASE_LOST, CONFLICT, GONE = 1, 2, 3, 4, 5
-- DropReason
local STALE, ZERO_VARIANCE, FILTERED, GROUP_DEAD, SURPLUS, INVALID = 1, 2, 3, 4, 5, 7

-- Places in a sample's record. OWNER is the replica that leased it; VERSIONS is {epoch, lowest, highest, ...}; LOST
-- counts leases in a row that expired without a heartbeat; REQUEUED is 1 for a sample that was dead before.
local STATE, LEASE, OWNER, ATTEMPT, SAVED, APPENDED_FROM = 1, 2, 3, 4, 5, 6
local TOKENS, COMPLETION, FINISH, VERSIONS, REWARD = 7, 8, 9, 10, 11
local GENERATE_LEASE, SCORE_LEASE, RELEASED_LEASE, REQUEUED, LOST = 12, 13, 14, 15, 16
-- Digests of the blobs its payload refers to; nil for none.
local BLOBS = 17
-- APPENDED_FROM of a lease that was never extended, and of one under which no token was saved.
local NEVER_EXTENDED, NOTHING_APPENDED = -2, -1

-- A closed group is remembered this long, to tell repeated calls from unknown samples.
local CLOSED_TTL_MS = 3600000
-- Dead letters beyond the newest ones are only counted (policy.KEPT_DEAD).
local KEPT_DEAD = 1000
local function fail(kind, field, reason)
  return { cmsgpack.pack({ error = kind, field = field, reason = reason }) }
end

local M
local meta_changed = false
do
  local raw = call('GET', P .. 'meta')
  if raw then M = cmsgpack.unpack(raw) end
end

local now = call('TIME')
now = now[1] * 1000 + math.floor(now[2] / 1000)

local groups, touched = {}, {}
local closed_groups, ready_groups = 0, 0

local function member(order) return string.format('%012d', order) end

local function group(order)
  local g = groups[order]
  if g == nil then
    local raw = call('GET', P .. 'g:' .. order)
    g = raw and cmsgpack.unpack(raw) or false
    groups[order] = g
  end
  return g
end

local function touch(g) touched[g.order] = g end

local function bump(counter, by)
  if by > 0 then
    M.counters[counter] = (M.counters[counter] or 0) + by
    meta_changed = true
  end
end

local function next_lease()
  M.last_lease = M.last_lease + 1
  meta_changed = true
  return M.last_lease
end

-- The step on today's history that is as far from its tip as the version is (policy.effective_step).
local function effective(epoch, step)
  local shared = step
  for e, fork in pairs(M.forks) do
    if tonumber(e) > epoch and fork < shared then shared = fork end
  end
  return 2 * shared - step
end

-- The effective step of the oldest token of a sample, nil while it has none.
local function tokens_effective(s)
  local oldest
  local versions = s[VERSIONS]
  for at = 1, #versions, 3 do
    local low = math.min(effective(versions[at], versions[at + 1]), effective(versions[at], versions[at + 2]))
    if not oldest or low < oldest then oldest = low end
  end
  return oldest
end

local function group_effective(g)
  local oldest = effective(g.birth_epoch, g.birth_step)
  for _, s in ipairs(g.samples) do
    oldest = math.min(oldest, tokens_effective(s) or oldest)
  end
  return oldest
end

local function limit() return (M.max_staleness + 1) * M.batch_groups + M.surplus_groups end

-- Whether more groups are admitted than can be trained in time, and the surplus is to be told by name.
local function over_sampled() return M.surplus_groups > 0 and M.on_stale == 'wait' end

-- Whether a filter may reject a group that lies behind the last one of its step (policy.speculative).
local function speculative() return over_sampled() and M.max_staleness == 0 end

local function occupied()
  local total = call('ZCARD', P .. 'live') + call('ZCARD', P .. 'bound')
  for _, trained in pairs(M.trained) do total = total + trained end
  return total
end

-- Whether a group admitted now would be too old for the next step from the start.
local function behind() return M.pub_epoch > 0 and M.pub_step + M.max_staleness < M.step end

-- Groups that may be admitted.
local function room_left() return behind() and 0 or math.max(0, limit() - occupied()) end

local function serial(g, i) return string.format('%d', g.order * M.group_size + i - 1) end

local function partial_key(g, i) return P .. 'd:' .. g.order .. ':' .. (i - 1) end

local function length(s) return s[COMPLETION] > 0 and s[COMPLETION] or s[SAVED] end

-- Enters sample i into the closed state `name`, or takes it out again.
local function tally(name, g, i, entered)
  call('SETBIT', P .. 'b:' .. name, serial(g, i), entered and 1 or 0)
  local sums = M.sums[name] or { 0, 0 }
  local sign = entered and 1 or -1
  local tokens = length(g.samples[i])
  sums[1] = sums[1] + sign * tokens
  if tokens > 0 then sums[2] = sums[2] + sign end
  M.sums[name] = sums
  meta_changed = true
end

local function facts(s)
  local oldest_epoch, oldest_step = s[VERSIONS][1] or 0, s[VERSIONS][2] or 0
  return { s[TOKENS], length(s), s[FINISH], oldest_epoch, oldest_step, s[REWARD] }
end

local function release_blobs(s)
  for _, digest in ipairs(s[BLOBS] or {}) do
    if call('HINCRBY', P .. 'blobs', digest, -1) <= 0 then call('HDEL', P .. 'blobs', digest) end
  end
  s[BLOBS] = nil
end

local function end_lease(g, i)
  local state = g.samples[i][STATE]
  if state == GENERATING then call('ZREM', P .. 'lease:1', serial(g, i)) end
  if state == SCORING then call('ZREM', P .. 'lease:2', serial(g, i)) end
end

-- A group issued again has the place of the first one in the order of issue.
local function list_place(g)
  if g.place ~= g.order then call('HSET', P .. 'places', g.order, g.place) end
end

-- `place` is nil for a group that is issued for the first time.
local function new_group(ordinal, prompt, place)
  local g = { order = M.next_order, ordinal = ordinal, birth_epoch = 0, birth_step = 0, bound = 0, closed = '',
              pending = false, scorable = false, judged = false, samples = {}, place = place or M.next_order,
              rejected = 0 }
  for i = 1, M.group_size do g.samples[i] = { PENDING, 0, '', 0, 0, -1, 0, 0, 0, {}, 0, 0, 0, 0, 0, 0 } end
  M.next_order = M.next_order + 1
  M.accepted = M.accepted + M.group_size
  meta_changed = true
  groups[g.order] = g
  touch(g)
  call('HSET', P .. 'p:' .. g.order, 'prompt', prompt)
  call('ZADD', P .. 'fresh', g.place, member(g.order))
  list_place(g)
  return g.order
end

-- Takes a group out of every index but its samples' leases.
local function unlist(g)
  local m = member(g.order)
  if g.place ~= g.order then call('HDEL', P .. 'places', g.order) end
  if g.birth_epoch == 0 then
    call('ZREM', P .. 'fresh', m)
  elseif g.rejected > 0 then
    call('ZREM', P .. 'rejected', m)
  elseif g.bound > 0 then
    call('ZREM', P .. 'bound', m)
  else
    call('ZREM', P .. 'live', m)
    call('ZREM', P .. 'ready', m)
  end
  g.bound = 0
end

local function close_ordinal(g)
  if g.ordinal >= 0 then call('ZADD', P .. 'closed', M.step, string.format('%d', g.ordinal)) end
end

-- Closes a whole group. A STALE or SURPLUS one is issued again, in its place; of one that is `kept` the prompt stays.
local function drop(g, reason)
  local name = 'dropped:' .. reason
  for i, s in ipairs(g.samples) do
    if s[STATE] ~= DEAD then
      end_lease(g, i)
      if s[SAVED] > 0 then call('UNLINK', partial_key(g, i)) end
      release_blobs(s)
      tally(name, g, i, true)
      s[STATE] = DROPPED
    end
  end
  unlist(g)
  if reason == STALE or reason == SURPLUS then
    new_group(g.ordinal, call('HGET', P .. 'p:' .. g.order, 'prompt'), g.place)
  else
    close_ordinal(g)
  end
  if g.kept then
    for i = 0, #g.samples - 1 do call('HDEL', P .. 'p:' .. g.order, 's' .. i, 'v' .. i) end
  else
    call('UNLINK', P .. 'p:' .. g.order)
  end
  if g.rejected == 0 and (reason == ZERO_VARIANCE or reason == FILTERED) then M.filtered = M.filtered + 1 end
  g.closed = name
  closed_groups = closed_groups + 1
  touch(g)
end

-- Drops a group that a filter does not want: at once, or when it is known that it had its turn.
local function reject(g, reason, counter)
  if not speculative() then
    if counter then bump(counter, 1) end
    return drop(g, reason)
  end
  unlist(g)
  g.rejected, g.rejected_as = reason, counter
  for i, s in ipairs(g.samples) do
    call('HDEL', P .. 'p:' .. g.order, 's' .. (i - 1), 'v' .. (i - 1))
    release_blobs(s)
  end
  call('ZADD', P .. 'rejected', group_effective(g), member(g.order))
  M.filtered = M.filtered + 1
  meta_changed = true
  closed_groups = closed_groups + 1
  touch(g)
end

-- Drops groups that no later step may train, by the name of the cause. Their deadline is their effective step + 1 +
-- max_staleness.
local function close_stale()
  local last = M.step - 1 - M.max_staleness
  local live = M.on_stale ~= 'mask' and call('ZRANGEBYSCORE', P .. 'live', '-inf', last) or {}
  for _, m in ipairs(live) do drop(group(tonumber(m)), over_sampled() and SURPLUS or STALE) end
  for _, m in ipairs(call('ZRANGEBYSCORE', P .. 'rejected', '-inf', last)) do drop(group(tonumber(m)), SURPLUS) end
end

-- If all samples are scored: READY together, dropped by the filter, or left to be judged.
local function finish(g)
  local low, high
  for _, s in ipairs(g.samples) do
    if s[STATE] == SCORED then
      if not low or s[REWARD] < low then low = s[REWARD] end
      if not high or s[REWARD] > high then high = s[REWARD] end
    elseif s[STATE] ~= DEAD then
      return
    end
  end
  if M.judged and not g.judged then return end
  if M.drop_zero_variance and low == high then
    if not M.zero_variance_fallback or M.filtered < M.refill_groups then return reject(g, ZERO_VARIANCE) end
    bump('filter.kept_when_insufficient', 1)
  end
  for _, s in ipairs(g.samples) do
    if s[STATE] == SCORED then s[STATE] = READY end
  end
  call('ZADD', P .. 'ready', group_effective(g), member(g.order))
  ready_groups = ready_groups + 1
  touch(g)
end

local function refer_to_blobs(s, digests)
  if #digests == 0 then return end
  s[BLOBS] = digests
  for _, digest in ipairs(digests) do call('HINCRBY', P .. 'blobs', digest, 1) end
end

-- Lets go of what a requeue of the group would need.
local function forget_prompt(g)
  call('UNLINK', P .. 'p:' .. g.order)
  g.kept = false
  touch(g)
end

local function write_letter(g, i, message)
  local s, name = g.samples[i], serial(g, i)
  call('ZADD', P .. 'dead', next_lease(), name)
  call('HSET', P .. 'letters', name, cmsgpack.pack({ message, now, s[ATTEMPT], facts(s) }))
  if call('ZCARD', P .. 'dead') <= KEPT_DEAD then return end
  local oldest = call('ZPOPMIN', P .. 'dead')[1]
  call('HDEL', P .. 'letters', oldest)
  local its_group = group(math.floor(tonumber(oldest) / M.group_size))
  if its_group and its_group.kept then forget_prompt(its_group) end
end

-- Makes a dead letter of a sample; its group goes on without it or is dropped.
local function kill(g, i, message)
  local s = g.samples[i]
  end_lease(g, i)
  if s[SAVED] > 0 then call('UNLINK', partial_key(g, i)) end
  call('HDEL', P .. 'p:' .. g.order, 's' .. (i - 1), 'v' .. (i - 1))
  release_blobs(s)
  tally('dead', g, i, true)
  s[STATE], s[REQUEUED] = DEAD, 0
  write_letter(g, i, message)
  local alive = 0
  for _, each in ipairs(g.samples) do
    if each[STATE] ~= DEAD then alive = alive + 1 end
  end
  touch(g)
  if alive >= M.min_group_size then return finish(g) end
  g.kept = true
  drop(g, GROUP_DEAD)
end

local function give_back(g, i)
  local s = g.samples[i]
  end_lease(g, i)
  local scored = s[SCORE_LEASE] > 0 and SCORED or GENERATED
  s[STATE] = s[STATE] == GENERATING and PENDING or scored
  touch(g)
end

-- Counts a failure of the sample; returns it to its mailbox, or kills it.
local function count_failure(g, i, message)
  local s = g.samples[i]
  s[ATTEMPT] = s[ATTEMPT] + 1
  if s[ATTEMPT] >= M.max_attempts then kill(g, i, message) else give_back(g, i) end
end

local function relist(g, index, wanted)
  if wanted == g[index] then return end
  if wanted then
    call('ZADD', P .. index, g.place, member(g.order))
  else
    call('ZREM', P .. index, member(g.order))
  end
  g[index] = wanted
end

-- Whether all samples of a live group are scored and the filter is to be asked.
local function judgeable(g)
  if g.closed ~= '' or g.birth_epoch == 0 or g.rejected > 0 then return false end
  for _, s in ipairs(g.samples) do
    if s[STATE] ~= SCORED and s[STATE] ~= DEAD then return false end
  end
  return true
end

-- Whether the generated samples of the group need not wait for its others.
local function may_be_scored(g)
  if not M.scored_whole then return true end
  for _, s in ipairs(g.samples) do
    if s[STATE] == PENDING or s[STATE] == GENERATING or s[STATE] == SCORING then return false end
  end
  return true
end

-- Brings the indexes of mailboxes up to date with the groups that were touched.
local function reindex()
  for _, g in pairs(touched) do
    local pending, generated = false, false
    if g.closed == '' and g.birth_epoch > 0 then
      for _, s in ipairs(g.samples) do
        pending = pending or s[STATE] == PENDING
        generated = generated or s[STATE] == GENERATED
      end
    end
    relist(g, 'pending', pending)
    relist(g, 'scorable', generated and may_be_scored(g) or judgeable(g))
  end
end

-- How many calls have changed something, before this one and with it: less before than a caller has seen means that the
-- server came back without what it had acknowledged.
local function positions()
  if meta_changed or next(touched) then
    local after = call('INCR', P .. 'writes')
    return after - 1, after
  end
  local unchanged = tonumber(call('GET', P .. 'writes') or 0)
  return unchanged, unchanged
end

-- Writes what was changed and answers: the body, byte strings `blobs`, the positions.
local function answer(body, blobs)
  reindex()
  for order, g in pairs(touched) do
    if g.closed == '' or g.closed == 'consumed' or g.kept then
      call('SET', P .. 'g:' .. order, cmsgpack.pack(g))
    else
      call('SET', P .. 'g:' .. order, cmsgpack.pack(g), 'PX', CLOSED_TTL_MS)
    end
  end
  if meta_changed then call('SET', P .. 'meta', cmsgpack.pack(M)) end
  local out = { cmsgpack.pack(body) }
  for k, blob in ipairs(blobs or {}) do out[k + 1] = blob end
  out[#out + 1], out[#out + 2] = positions()
  return out
end

-- The refusal of an epoch that is not the current one, nil for the current one.
local function fence(epoch)
  if epoch < M.epoch then
    return fail('FencedError', 'epoch', epoch .. ' was superseded by ' .. M.epoch)
  elseif epoch > M.epoch then
    return fail('PreconditionError', 'epoch', epoch .. ' was never acquired: the last one is ' .. M.epoch)
  end
end
