-- ARGV[1]: {epoch, step, batch_lease_id, trained}. All or nothing, once per step and lease.
local epoch, step, lease, trained = unpack(cmsgpack.unpack(ARGV[1]))
local fenced = fence(epoch)
if fenced then return fenced end
local raw = call('GET', P .. 'batch:' .. step)
local batch = raw and cmsgpack.unpack(raw)
local ours = batch and batch.epoch == epoch and batch.lease == lease
if ours and batch.committed then return answer({ false }) end
if step ~= M.step + 1 then
  return fail('PreconditionError', 'step', step .. ' does not follow the last committed step ' .. M.step)
end
if not ours or M.batch_lease ~= lease then
  return fail('PreconditionError', 'batch_lease_id', 'no batch of step ' .. step .. ' was leased under ' .. lease)
end

M.step, M.batch_epoch, M.batch_step, M.batch_lease = step, 0, 0, 0
meta_changed = true
local last_place = -1
for _, order in ipairs(batch.orders) do
  local g = group(order)
  last_place = math.max(last_place, g.place)
  if not trained then
    drop(g, INVALID)
  else
    for i, s in ipairs(g.samples) do
      if s[STATE] == TRAINING then
        s[STATE] = CONSUMED
        tally('consumed', g, i, true)
      end
    end
    unlist(g)
    close_ordinal(g)
    g.closed = 'consumed'
    touch(g)
  end
end
-- The verdict of a filter on groups before the last one counts: the step came to them.
for _, m in ipairs(call('ZRANGE', P .. 'rejected', 0, -1)) do
  local g = group(tonumber(m))
  if g.place < last_place then
    if g.rejected_as then bump(g.rejected_as, 1) end
    drop(g, g.rejected)
  end
end
-- A step that was skipped is gone for the groups that wait, too.
M.trained[tostring(step)] = #batch.orders
batch.committed = true
call('SET', P .. 'batch:' .. step, cmsgpack.pack(batch))
return answer({ true })
