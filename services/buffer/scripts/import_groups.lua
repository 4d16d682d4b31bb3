-- ARGV[1]: {request_id, kept, groups}, a group being its samples {num_tokens, completion_tokens, finish_reason, versions,
-- scored, reward, digests of blobs}; ARGV[2..]: per group its prompt, then per sample payload and score. All or nothing, once per request_id.
local request_id, kept, imported = unpack(cmsgpack.unpack(ARGV[1]))
local known = known_submit(request_id)
if known then return answer({ known, 0 }) end

local function refused(reason, k, i)
  local field = k and 'groups[' .. (k - 1) .. '].samples[' .. (i - 1) .. '].sample.segments' or 'groups'
  return fail('PreconditionError', field, reason)
end

local function in_history(epoch, step)
  local fork = M.forks[tostring(epoch)]
  return epoch <= M.epoch and fork and step >= fork and effective(epoch, step) <= M.step
end

local function check()
  if M.pub_epoch == 0 then return refused('no version published yet') end
  if behind() then return refused('weights of step ' .. M.step .. ' are not published') end
  local live = occupied()
  if live + #imported > limit() then
    return refused('staleness bound: ' .. live .. ' of ' .. limit() .. ' groups live, ' .. #imported .. ' more came')
  end
  for k, samples in ipairs(imported) do
    for i, row in ipairs(samples) do
      local versions = row[4]
      for at = 1, #versions, 3 do
        for _, step in ipairs({ versions[at + 1], versions[at + 2] }) do
          local text = 'e' .. versions[at] .. '.s' .. step
          if not in_history(versions[at], step) then
            return refused(text .. " is no version of this run's history", k, i)
          end
          if M.on_stale ~= 'mask' and effective(versions[at], step) + 1 + M.max_staleness <= M.step then
            return refused(text .. ' is older than max_staleness = ' .. M.max_staleness .. ' allows', k, i)
          end
        end
      end
    end
  end
end

local problem = check()
if problem then return problem end
local orders, at = {}, 2
for k, samples in ipairs(imported) do
  local order = new_group(-1, ARGV[at])
  local g = group(order)
  orders[k], at = order, at + 1
  local name = string.format('g%08d', order)
  for i, row in ipairs(samples) do
    local s, id = g.samples[i], string.format('%s-%03d', name, i - 1)
    local scored
    s[TOKENS], s[COMPLETION], s[FINISH], s[VERSIONS], scored, s[REWARD] = unpack(row, 1, 6)
    refer_to_blobs(s, row[7])
    s[STATE], s[SCORE_LEASE] = scored and SCORED or GENERATED, scored and next_lease() or 0
    -- Fields 1 and 2 of the message: it came without them.
    local ids = string.char(10, #id) .. id .. string.char(18, #name) .. name
    call('HSET', P .. 'p:' .. order, 's' .. (i - 1), ARGV[at] .. ids)
    if scored then call('HSET', P .. 'p:' .. order, 'v' .. (i - 1), ARGV[at + 1]) end
    at = at + 2
  end
  g.birth_epoch, g.birth_step = M.pub_epoch, M.pub_step
  call('ZREM', P .. 'fresh', member(order))
  call('ZADD', P .. 'live', group_effective(g), member(order))
  bump('samples_imported', #samples)
  finish(g)
end
remember_submit(request_id, kept, orders)
return answer({ orders, ready_groups })
