-- ARGV[1]: {found, acknowledged}: the position that a caller found, and the higher one that it had seen before. Counts what
-- is missing, once for all callers; answers how much.
local found, acknowledged = unpack(cmsgpack.unpack(ARGV[1]))
local missing = math.max(0, acknowledged - math.max(found, M.lost_up_to or 0))
if missing > 0 then
  bump('lost_after_restart', missing)
  M.lost_up_to = acknowledged
  local writes = math.max(acknowledged, tonumber(call('GET', P .. 'writes') or 0))
  call('SET', P .. 'writes', string.format('%d', writes))
end
return answer({ missing })
