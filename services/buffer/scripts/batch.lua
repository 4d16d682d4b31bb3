-- What the batch verbs on leased samples share.

-- The group and the place of a referenced sample; nil when there is none.
local function sample_at(order, index)
  local g = group(order)
  if g and g.samples[index + 1] then return g, index + 1, g.samples[index + 1] end
end

-- Why a lease does not hold, nil when it does.
local function lost(g, s, lease, state, other_state)
  if not g or g.closed ~= '' or s[STATE] == DEAD then return GONE end
  if (s[STATE] ~= state and s[STATE] ~= other_state) or s[LEASE] ~= lease then return LEASE_LOST end
end

-- Applies `one` to each row of ARGV[1] and answers {outcome, saved tokens} for each, in order.
local function each_sample(one)
  local results = {}
  for k, row in ipairs(cmsgpack.unpack(ARGV[1])) do
    local outcome, saved = one(row, k)
    results[k] = { outcome, saved or 0 }
  end
  return answer({ results, ready_groups, closed_groups })
end
