-- ARGV[1]: {epoch, step}. Answers {low_water, ordinals closed at or above it}.
local epoch, step = unpack(cmsgpack.unpack(ARGV[1]))
local fenced = fence(epoch)
if fenced then return fenced end
if step < M.retired_step or step > M.step then
  return fail('PreconditionError', 'step', step .. ' is not between the retired step ' .. M.retired_step
    .. ' and the last step ' .. M.step)
end
local closed, low_water = {}, M.low_water
for _, text in ipairs(call('ZRANGEBYSCORE', P .. 'closed', '-inf', step)) do closed[tonumber(text)] = true end
while closed[low_water] do
  closed[low_water] = nil
  low_water = low_water + 1
end
local above = {}
for ordinal in pairs(closed) do above[#above + 1] = ordinal end
table.sort(above)
return answer({ low_water, above })
