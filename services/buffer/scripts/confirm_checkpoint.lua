-- ARGV[1]: {epoch, oldest_kept_step}. Answers the number of samples retired.
local epoch, kept = unpack(cmsgpack.unpack(ARGV[1]))
local fenced = fence(epoch)
if fenced then return fenced end
if kept > M.step then
  return fail('PreconditionError', 'oldest_kept_step', kept .. ' is above the last committed step ' .. M.step)
end
local retired = 0
for step = M.retired_step + 1, kept do
  local raw = call('GET', P .. 'batch:' .. step)
  for _, order in ipairs(raw and cmsgpack.unpack(raw).orders or {}) do
    local g = group(order)
    if g and g.closed == 'consumed' then
      for i, s in ipairs(g.samples) do
        if s[STATE] == CONSUMED then
          tally('consumed', g, i, false)
          tally('retired', g, i, true)
          retired = retired + 1
        end
      end
      call('UNLINK', P .. 'g:' .. order, P .. 'p:' .. order)
      groups[order] = nil
    end
  end
  call('UNLINK', P .. 'batch:' .. step)
end
if kept > M.retired_step then
  M.retired_step = kept
  meta_changed = true
end
local closed = {}
for _, text in ipairs(call('ZRANGEBYSCORE', P .. 'closed', '-inf', kept)) do closed[tonumber(text)] = true end
while closed[M.low_water] do
  call('ZREM', P .. 'closed', string.format('%d', M.low_water))
  M.low_water = M.low_water + 1
  meta_changed = true
end
return answer({ retired })
