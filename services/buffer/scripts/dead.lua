-- What can be done for a dead sample.

-- RequeueOutcome
local REQUEUED_IN_GROUP, REISSUED_GROUP, REQUEUED_BEFORE, GROUP_WENT_ON, NO_LETTER = 1, 2, 3, 4, 5

local function may_wait_for_more(g)
  if g.closed ~= '' or g.rejected > 0 then return false end
  for _, s in ipairs(g.samples) do
    if s[STATE] == READY or s[STATE] == TRAINING then return false end
  end
  return true
end

local function requeue_outcome(order, index)
  local g = group(order)
  local s = g and g.samples[index + 1]
  if s and s[STATE] ~= DEAD and s[REQUEUED] == 1 then return REQUEUED_BEFORE end
  local name = string.format('%d', order * M.group_size + index)
  if index >= M.group_size or call('HEXISTS', P .. 'letters', name) == 0 then return NO_LETTER end
  if not g then return GROUP_WENT_ON end
  if g.reissued_as then return REQUEUED_BEFORE end
  if g.kept then return REISSUED_GROUP end
  return may_wait_for_more(g) and REQUEUED_IN_GROUP or GROUP_WENT_ON
end
