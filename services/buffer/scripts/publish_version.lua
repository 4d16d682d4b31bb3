-- ARGV[1]: {epoch, step}
local epoch, step = unpack(cmsgpack.unpack(ARGV[1]))
local fenced = fence(epoch)
if fenced then return fenced end
local fork = M.forks[tostring(epoch)]
if not fork then
  return fail('PreconditionError', 'version.epoch', 'epoch ' .. epoch .. ' has to Recover first')
end
if step < fork or step > M.step then
  return fail('PreconditionError', 'version.step', 'step ' .. step .. " is no step of this epoch's history")
end
if epoch == M.pub_epoch and step < M.pub_step then
  return fail('PreconditionError', 'version', 'e' .. epoch .. '.s' .. step .. ' is older than the published e'
    .. M.pub_epoch .. '.s' .. M.pub_step)
end
if epoch ~= M.pub_epoch or step ~= M.pub_step then
  M.pub_epoch, M.pub_step, M.floor_epoch, M.floor_step = epoch, step, epoch, step
  local trained = {}
  for at, count in pairs(M.trained) do
    if tonumber(at) > step then trained[at] = count end
  end
  M.trained = trained
  meta_changed = true
end
-- What the last step left is issued again before anything new is: the next lease may be a replica's.
close_stale()
return answer({})
