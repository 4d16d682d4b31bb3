-- ARGV[1]: {state, start, limit}. Answers rows {order, index, attempt, facts, letter} and where the next page starts, 0 for
-- nowhere. Dead letters are placed by order of death, all others by their serial numbers.
local state, start, limit = unpack(cmsgpack.unpack(ARGV[1]))
local rows = {}

local function list_dead()
  local found = call('ZRANGEBYSCORE', P .. 'dead', start, '+inf', 'WITHSCORES', 'LIMIT', 0, limit + 1)
  for at = 1, #found, 2 do
    if #rows == limit then return tonumber(found[at + 1]) end
    local serial_number = tonumber(found[at])
    local order, index = math.floor(serial_number / M.group_size), serial_number % M.group_size
    local message, died, attempt, known = unpack(cmsgpack.unpack(call('HGET', P .. 'letters', found[at])))
    rows[#rows + 1] = { order, index, attempt, known, { message, died, requeue_outcome(order, index) } }
  end
  return 0
end

local function orders_with()
  local orders = {}
  if state == CONSUMED then
    for step = M.retired_step + 1, M.step do
      local raw = call('GET', P .. 'batch:' .. step)
      for _, order in ipairs(raw and cmsgpack.unpack(raw).orders or {}) do orders[#orders + 1] = order end
    end
  else
    for _, index in ipairs({ 'fresh', 'live', 'bound', 'rejected' }) do
      for _, m in ipairs(call('ZRANGE', P .. index, 0, -1)) do orders[#orders + 1] = tonumber(m) end
    end
  end
  table.sort(orders)
  return orders
end

local function list_others()
  for _, order in ipairs(orders_with()) do
    local g = (order + 1) * M.group_size > start and group(order)
    for i, s in ipairs(g and g.samples or {}) do
      local serial_number = order * M.group_size + i - 1
      if s[STATE] == state and serial_number >= start then
        if #rows == limit then return serial_number end
        rows[#rows + 1] = { order, i - 1, s[ATTEMPT], facts(s), {} }
      end
    end
  end
  return 0
end

local following = state == DEAD and list_dead() or state ~= DEAD and list_others() or 0
return answer({ rows, following })
