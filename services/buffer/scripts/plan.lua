-- Which groups the next step is trained on.

-- Samples of the stage's mailbox, for the reason why a batch waits.
local function scorable_samples()
  local count = call('ZCARD', P .. 'lease:2')
  for _, m in ipairs(call('ZRANGE', P .. 'scorable', 0, -1)) do
    local g = group(tonumber(m))
    for _, s in ipairs(g.samples) do
      if s[STATE] == GENERATED or (s[STATE] == SCORED and judgeable(g)) then count = count + 1 end
    end
  end
  return count
end

-- The places of the open groups that were issued again, by order; the others' are their orders.
local function places()
  local found, flat = {}, call('HGETALL', P .. 'places')
  for at = 1, #flat, 2 do found[tonumber(flat[at])] = tonumber(flat[at + 1]) end
  return found
end

-- Rows {deadline, order, ...} by deadline and place.
local function by_place(rows, place_of)
  local function place(row) return place_of[row[2]] or row[2] end
  table.sort(rows, function(a, b) return a[1] < b[1] or (a[1] == b[1] and place(a) < place(b)) end)
  return rows
end

-- {deadline, order} of at least the first `room` ready groups, by deadline and place.
local function ready(room, place_of)
  -- The index has them by deadline and order.
  local all = over_sampled() or next(place_of)
  local rows, found = {}, call('ZRANGE', P .. 'ready', 0, all and -1 or room - 1, 'WITHSCORES')
  for at = 1, #found, 2 do rows[#rows + 1] = { found[at + 1] + 1 + M.max_staleness, tonumber(found[at]) } end
  return by_place(rows, place_of)
end

-- {deadline, order, bound} of the live groups that are not in `left_out`, by deadline and place.
local function by_deadline(left_out, place_of)
  local rows = {}
  local live = call('ZRANGE', P .. 'live', 0, -1, 'WITHSCORES')
  for at = 1, #live, 2 do
    local order = tonumber(live[at])
    if not left_out[order] then rows[#rows + 1] = { live[at + 1] + 1 + M.max_staleness, order, false } end
  end
  local bound = call('ZRANGE', P .. 'bound', 0, -1, 'WITHSCORES')
  for at = 1, #bound, 2 do
    local order = tonumber(bound[at])
    if not left_out[order] then rows[#rows + 1] = { tonumber(bound[at + 1]), order, true } end
  end
  return by_place(rows, place_of)
end

-- The groups that cannot be trained in time while those before them are (policy.surplus), as a set of orders.
local function surplus(step, place_of)
  local left_over, assigned = {}, 0
  for _, row in ipairs(over_sampled() and by_deadline({}, place_of) or {}) do
    if assigned < (row[1] - step + 1) * M.batch_groups then assigned = assigned + 1 else left_over[row[2]] = true end
  end
  return left_over
end

-- The group to wait for before `chosen` may be trained, nil for none (policy.blocking_group).
local function blocking_group(step, chosen, last_chosen, left_out, place_of)
  for _, order in ipairs(chosen) do left_out[order] = true end
  local rows = by_deadline(left_out, place_of)
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
  local step, place_of = M.step + 1, places()
  local chosen, recorded, last_due, left_over = {}, {}, -math.huge, surplus(step, place_of)
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
    for _, row in ipairs(room > 0 and ready(room, place_of) or {}) do
      if #chosen < M.batch_groups and not left_over[row[2]] then
        chosen[#chosen + 1] = row[2]
        last_due = math.max(last_due, row[1])
      end
    end
    if #chosen < M.batch_groups then
      if M.filtered > 0 and M.filtered >= M.refill_groups then
        return nil, { 'filtered', #chosen, M.batch_groups, M.filtered }
      end
      return nil, { 'groups', #chosen, M.batch_groups, call('ZCARD', P .. 'lease:1'), scorable_samples() }
    end
  end
  if M.on_stale == 'wait' then
    local blocking = blocking_group(step, chosen, last_due, left_over, place_of)
    if blocking then return nil, { 'deadline', blocking } end
  end
  return chosen
end
