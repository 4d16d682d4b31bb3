-- ARGV[1]: {epoch, step, payload, max_bytes}. Blobs: per group '', then per sample payload, score. When payloads and
-- scores are more than max_bytes, all payloads are ''.
local epoch, step, payload, most = unpack(cmsgpack.unpack(ARGV[1]))
local fenced = fence(epoch)
if fenced then return fenced end
if not M.forks[tostring(epoch)] then
  return fail('PreconditionError', 'epoch', 'epoch ' .. epoch .. ' has to Recover first')
end

local blobs, payloads_at, size = {}, {}, 0

local function withhold_payloads()
  payload = false
  for _, at in ipairs(payloads_at) do blobs[at] = '' end
end

local function leased_group(order)
  local g = group(order)
  local samples, fields, oldest = {}, {}, nil
  for i, s in ipairs(g.samples) do
    if s[STATE] ~= DEAD then
      samples[#samples + 1] = { i - 1, s[LEASE], s[ATTEMPT], facts(s) }
      fields[#fields + 1] = payload and 's' .. (i - 1) or '-'
      fields[#fields + 1] = 'v' .. (i - 1)
      oldest = math.min(oldest or math.huge, tokens_effective(s) or math.huge)
    end
  end
  blobs[#blobs + 1] = ''
  local stored = call('HMGET', P .. 'p:' .. order, unpack(fields))
  for k = 1, #fields, 2 do
    blobs[#blobs + 1] = payload and stored[k] or ''
    payloads_at[#payloads_at + 1] = #blobs
    blobs[#blobs + 1] = stored[k + 1] or ''
    size = size + #blobs[#blobs - 1] + #blobs[#blobs]
    if payload and size > most then withhold_payloads() end
  end
  return { g.order, g.ordinal, oldest < math.huge and step - 1 - oldest or 0, samples }
end

local function leased_batch(orders)
  local leased = {}
  for _, order in ipairs(orders) do leased[#leased + 1] = leased_group(order) end
  return answer({ leased, {}, closed_groups, 0, {}, M.batch_lease }, blobs)
end

if M.batch_lease > 0 and M.batch_epoch == epoch and M.batch_step == step then
  return leased_batch(cmsgpack.unpack(call('GET', P .. 'batch:' .. step)).orders)
end
if step ~= M.step + 1 then
  return fail('PreconditionError', 'step', step .. ' does not follow the last committed step ' .. M.step)
end

close_stale()
local chosen, waiting = plan_batch()
if not chosen then return answer({ {}, waiting, closed_groups, 0, {}, 0 }) end

for _, order in ipairs(chosen) do
  local g = group(order)
  for _, s in ipairs(g.samples) do
    if s[STATE] == READY then s[STATE] = TRAINING end
  end
  call('ZREM', P .. 'ready', member(order))
  touch(g)
end
M.batch_epoch, M.batch_step, M.batch_lease, M.filtered = epoch, step, next_lease(), 0
call('SET', P .. 'batch:' .. step,
  cmsgpack.pack({ epoch = epoch, lease = M.batch_lease, orders = chosen, committed = false }))
return leased_batch(chosen)
