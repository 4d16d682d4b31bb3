-- Retires what the steps up to `last` consumed: payloads are deleted, counts stay. Returns the number of samples.
local function retire_steps(last)
  local retired = 0
  -- Steps above both have no batch; a watermark may be far ahead of an older store.
  local highest_bound = call('ZRANGE', P .. 'bound', -1, -1, 'WITHSCORES')[2] or 0
  for step = M.retired_step + 1, math.min(last, math.max(M.step + 1, tonumber(highest_bound))) do
    local raw = call('GET', P .. 'batch:' .. step)
    for _, order in ipairs(raw and cmsgpack.unpack(raw).orders or {}) do
      local g = group(order)
      if g and g.closed == 'consumed' then
        for i, s in ipairs(g.samples) do
          if s[STATE] == CONSUMED then
            tally('consumed', g, i, false)
            tally('retired', g, i, true)
            release_blobs(s)
            retired = retired + 1
          end
        end
        call('UNLINK', P .. 'g:' .. order, P .. 'p:' .. order)
        groups[order] = false
      end
    end
    if raw then call('UNLINK', P .. 'batch:' .. step) end
  end
  if last > M.retired_step then
    M.retired_step = last
    meta_changed = true
  end
  return retired
end
