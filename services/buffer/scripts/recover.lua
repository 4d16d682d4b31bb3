-- ARGV[1]: {epoch, step, watermark}, watermark {} or {low_water, closed, dataset_digest, seed}.
local epoch, step, mark = unpack(cmsgpack.unpack(ARGV[1]))
local fenced = fence(epoch)
if fenced then return fenced end

local function bound_steps()
  local seen, steps = {}, {}
  local bound = call('ZRANGE', P .. 'bound', 0, -1, 'WITHSCORES')
  for at = 2, #bound, 2 do
    local bound_step = tonumber(bound[at])
    if not seen[bound_step] then steps[#steps + 1] = bound_step end
    seen[bound_step] = true
  end
  return steps
end

local recovered = M.forks[tostring(epoch)]
if recovered then
  if recovered == step and step == M.step then return answer({ M.answers[tostring(epoch)], bound_steps() }) end
  return fail('PreconditionError', 'step', 'epoch ' .. epoch .. ' has recovered step ' .. recovered .. ' already')
end
if mark[3] and mark[3] ~= M.dataset_digest then
  return fail('ConfigError', 'data.prompt_data', 'the checkpoint was made with data set ' .. mark[3] .. ', this one is '
    .. M.dataset_digest)
end
if mark[4] and mark[4] ~= M.seed then
  return fail('ConfigError', 'data.seed', 'the checkpoint was made with seed ' .. mark[4] .. ', not ' .. M.seed)
end
if step > M.step and not mark[1] then
  return fail('PreconditionError', 'step', step .. " is above the store's last step " .. M.step
    .. ', and no watermark came')
end
if step < M.retired_step then
  return fail('PreconditionError', 'step', step .. ' is below the retired step ' .. M.retired_step)
end

local function set_state(g, from, to)
  local count = 0
  for _, s in ipairs(g.samples) do
    if s[STATE] == from then
      s[STATE] = to
      count = count + 1
    end
  end
  touch(g)
  return count
end

local function undo_lease()
  if M.batch_lease == 0 then return 0 end
  local orders = cmsgpack.unpack(call('GET', P .. 'batch:' .. M.batch_step)).orders
  for _, order in ipairs(orders) do set_state(group(order), TRAINING, READY) end
  M.batch_epoch, M.batch_step, M.batch_lease = 0, 0, 0
  return #orders
end

local function undo_commits()
  local returned = 0
  for at = step + 1, M.step do
    local batch = cmsgpack.unpack(call('GET', P .. 'batch:' .. at))
    for _, order in ipairs(batch.orders) do
      local g = group(order)
      if g and g.closed == 'consumed' then
        for i, s in ipairs(g.samples) do
          if s[STATE] == CONSUMED then tally('consumed', g, i, false) end
        end
        set_state(g, CONSUMED, READY)
        g.closed, g.bound = '', at
        call('ZADD', P .. 'bound', at, member(order))
        list_place(g)
        if g.ordinal >= 0 then call('ZREM', P .. 'closed', string.format('%d', g.ordinal)) end
        returned = returned + 1
      end
    end
    batch.committed = false
    call('SET', P .. 'batch:' .. at, cmsgpack.pack(batch))
  end
  for _, text in ipairs(call('ZRANGEBYSCORE', P .. 'closed', '(' .. step, '+inf')) do
    call('ZADD', P .. 'closed', step, text)
  end
  return returned
end

-- Takes over what a checkpoint knows and an older store does not. Nothing before it can be replayed any more.
local function adopt()
  retire_steps(step)
  local low_water, closed = mark[1], {}
  for _, ordinal in ipairs(mark[2]) do closed[ordinal] = true end
  for _, index in ipairs({ 'fresh', 'live', 'bound', 'rejected' }) do
    for _, m in ipairs(call('ZRANGE', P .. index, 0, -1)) do
      local g = group(tonumber(m))
      if g.ordinal >= 0 and (g.ordinal < low_water or closed[g.ordinal]) then
        for i, s in ipairs(g.samples) do
          if s[STATE] ~= DEAD then
            end_lease(g, i)
            if s[SAVED] > 0 then call('UNLINK', partial_key(g, i)) end
            tally('retired', g, i, true)
            release_blobs(s)
          end
        end
        unlist(g)
        relist(g, 'pending', false)
        relist(g, 'scorable', false)
        call('UNLINK', P .. 'g:' .. g.order, P .. 'p:' .. g.order)
        touched[g.order], groups[g.order] = nil, false
      elseif g.bound > 0 and g.bound <= step then
        unlist(g)
        list_place(g)
        touch(g)
        call('ZADD', P .. 'live', group_effective(g), m)
      end
    end
  end
  M.cursor = math.max(M.cursor, low_water)
  M.low_water = math.max(M.low_water, low_water)
  for ordinal in pairs(closed) do call('ZADD', P .. 'closed', step, string.format('%d', ordinal)) end
  for _, text in ipairs(call('ZRANGE', P .. 'closed', 0, -1)) do
    if tonumber(text) < M.low_water then call('ZREM', P .. 'closed', text) end
  end
end

-- Fork points have changed, and with them how old the tokens of live groups are.
local function reorder()
  for _, m in ipairs(call('ZRANGE', P .. 'live', 0, -1)) do
    local g = group(tonumber(m))
    local ready, oldest = true, group_effective(g)
    for _, s in ipairs(g.samples) do ready = ready and (s[STATE] == READY or s[STATE] == DEAD) end
    call('ZADD', P .. 'live', oldest, m)
    if ready then call('ZADD', P .. 'ready', oldest, m) end
  end
  for _, m in ipairs(call('ZRANGE', P .. 'rejected', 0, -1)) do
    call('ZADD', P .. 'rejected', group_effective(group(tonumber(m))), m)
  end
end

-- A group that its recorded step may no longer train, by the new history, is generated anew.
local function drop_late_replays()
  if M.on_stale == 'mask' then return end
  for _, at in ipairs(bound_steps()) do
    for _, order in ipairs(cmsgpack.unpack(call('GET', P .. 'batch:' .. at)).orders) do
      local g = group(order)
      if g and g.bound == at and group_effective(g) + 1 + M.max_staleness < at then drop(g, STALE) end
    end
  end
end

M.forks[tostring(epoch)] = step
meta_changed = true
local returned = undo_lease() + undo_commits()
if step > M.step then adopt() end
M.step = step
if M.pub_epoch > 0 and effective(M.pub_epoch, M.pub_step) ~= M.pub_step then M.pub_epoch, M.pub_step = 0, 0 end
M.floor_epoch, M.floor_step = M.pub_epoch, M.pub_step
if M.pub_epoch == 0 then M.floor_epoch, M.floor_step = epoch, step end
local trained = {}
for at, count in pairs(M.trained) do
  if tonumber(at) <= step then trained[at] = count end
end
M.trained = trained
reorder()
drop_late_replays()
M.answers[tostring(epoch)] = returned
return answer({ returned, bound_steps() })
