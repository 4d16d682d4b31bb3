-- ARGV[1]: {epoch, oldest_kept_step}. Answers the number of samples retired.
local epoch, kept = unpack(cmsgpack.unpack(ARGV[1]))
local fenced = fence(epoch)
if fenced then return fenced end
if kept > M.step then
  return fail('PreconditionError', 'oldest_kept_step', kept .. ' is above the last committed step ' .. M.step)
end
local retired = retire_steps(kept)
local closed = {}
for _, text in ipairs(call('ZRANGEBYSCORE', P .. 'closed', '-inf', kept)) do closed[tonumber(text)] = true end
while closed[M.low_water] do
  call('ZREM', P .. 'closed', string.format('%d', M.low_water))
  M.low_water = M.low_water + 1
  meta_changed = true
end
return answer({ retired })
