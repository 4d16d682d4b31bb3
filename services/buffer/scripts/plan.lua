-- Which groups the next step is trained on.

-- Samples of the stage's mailbox, for the reason why a batch waits.
local function scorable_samples()
  local count = call('ZCARD', P .. 'lease:2')
  for _, m in ipairs(call('ZRANGE', P .. 'scorable', 0, -1)) do
    for _, s in ipairs(group(tonumber(m)).samples) do
      if s[STATE] == GENERATED then count = count + 1 end
    end
  end
  return count
end

-- The group to wait for before `chosen` may be trained, nil for none (policy.blocking_group).
local function blocking_group(step, chosen, last_chosen)
  local taken, rows = {}, {}
  for _, order in ipairs(chosen) do taken[order] = true end
  local live = call('ZRANGE', P .. 'live', 0, -1, 'WITHSCORES')
  for at = 1, #live, 2 do
    local order = tonumber(live[at])
    if not taken[order] then rows[#rows + 1] = { live[at + 1] + 1 + M.max_staleness, order, false } end
  end
  local bound = call('ZRANGE', P .. 'bound', 0, -1, 'WITHSCORES')
  for at = 1, #bound, 2 do
    local order = tonumber(bound[at])
    if not taken[order] then rows[#rows + 1] = { tonumber(bound[at + 1]), order, true } end
  end
  table.sort(rows, function(a, b) return a[1] < b[1] or (a[1] == b[1] and a[2] < b[2]) end)
  local first
  for count, row in ipairs(rows) do
    if row[1] >= last_chosen then return nil end
    if not first and not row[3] then first = row[2] end
    local at_last_of_due = count == #rows or rows[count + 1][1] ~= row[1]
    if at_last_of_due and count > (row[1] - step) * M.batch_groups and first then return first end
  end
end

-- The orders of the next step's groups in position order, or nil and the reason.
local function plan_batch()
  local step = M.step + 1
  local chosen, recorded, last_due = {}, {}, 0
  local raw = call('GET', P .. 'batch:' .. step)
  if raw then recorded = cmsgpack.unpack(raw).orders end
  for _, order in ipairs(recorded) do
    local g = group(order)
    if g and g.bound == step then
      chosen[#chosen + 1] = order
      last_due = step
    end
  end
  if #chosen == 0 or #chosen < #recorded then
    local room = M.batch_groups - #chosen
    local ready = room > 0 and call('ZRANGE', P .. 'ready', 0, room - 1, 'WITHSCORES') or {}
    for at = 1, #ready, 2 do
      chosen[#chosen + 1] = tonumber(ready[at])
      last_due = math.max(last_due, ready[at + 1] + 1 + M.max_staleness)
    end
    if #chosen < M.batch_groups then
      return nil, { 'groups', #chosen, M.batch_groups, call('ZCARD', P .. 'lease:1'), scorable_samples() }
    end
  end
  if M.on_stale == 'wait' then
    local blocking = blocking_group(step, chosen, last_due)
    if blocking then return nil, { 'deadline', blocking } end
  end
  return chosen
end
