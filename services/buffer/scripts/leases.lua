-- Taking and ending leases of single samples, and why there are none to take.

-- Ends expired leases of a stage: the work returns, or dies.
local function take_back_expired(stage)
  local expired = call('ZRANGEBYSCORE', P .. 'lease:' .. stage, '-inf', now, 'LIMIT', 0, 1024)
  for _, text in ipairs(expired) do
    local at = tonumber(text)
    local g = group(math.floor(at / M.group_size))
    local i = at % M.group_size + 1
    local s = g and g.samples[i]
    if s and (s[STATE] == GENERATING or s[STATE] == SCORING) then
      bump('leases_expired', 1)
      if s[APPENDED_FROM] < 0 then
        count_failure(g, i, 'the lease expired without progress')
      else
        give_back(g, i)
      end
    end
  end
end

local function facts(s)
  local oldest_epoch, oldest_step = s[VERSIONS][1] or 0, s[VERSIONS][2] or 0
  return { s[TOKENS], length(s), s[FINISH], oldest_epoch, oldest_step, s[REWARD] }
end

-- Leases up to `left` samples of the group that are in `source`. Appends to `leased` and `blobs`; returns how many.
local function take(g, stage, source, target, owner, left, leased, blobs, payload)
  local samples, fields = {}, { 'prompt' }
  for i, s in ipairs(g.samples) do
    if #samples >= left then break end
    if s[STATE] == source then
      s[STATE], s[LEASE], s[OWNER], s[APPENDED_FROM] = target, next_lease(), owner, -1
      call('ZADD', P .. 'lease:' .. stage, now + M.lease_ttl_ms, serial(g, i))
      samples[#samples + 1] = { i - 1, s[LEASE], s[ATTEMPT], facts(s) }
      if payload then fields[#fields + 1] = 's' .. (i - 1) end
    end
  end
  if #samples == 0 then return 0 end
  touch(g)
  leased[#leased + 1] = { g.order, g.ordinal, 0, samples }
  local stored = call('HMGET', P .. 'p:' .. g.order, unpack(fields))
  blobs[#blobs + 1] = stored[1] or ''
  for k, each in ipairs(samples) do
    local i = each[1] + 1
    blobs[#blobs + 1] = g.samples[i][SAVED] > 0 and call('GET', partial_key(g, i)) or ''
    blobs[#blobs + 1] = payload and stored[k + 1] or ''
  end
  return #samples
end

-- The groups of an index in order; at most `most`, since each holds at least one sample of that kind.
local function listed(index, most)
  return call('ZRANGE', P .. index, 0, most - 1)
end

-- Why a replica at this version gets nothing to generate; epoch nil for no particular replica.
local function refuses(epoch, step)
  if M.pub_epoch == 0 then return { 'unpublished' } end
  if not epoch then return nil end
  if epoch < M.pub_epoch or (epoch == M.pub_epoch and step < M.pub_step) then
    return { 'below', M.pub_epoch, M.pub_step }
  end
  if effective(epoch, step) ~= step then return { 'abandoned' } end
end

local function why_no_generate(epoch, step, admit)
  local refused = refuses(epoch, step)
  if refused then return refused end
  local live = occupied()
  if live >= limit() then return { 'bound', live, limit() } end
  return admit and { 'prompts' } or { 'memory' }
end

local function why_no_score()
  local generating = call('ZCARD', P .. 'lease:1')
  if generating > 0 then return { 'generating', generating } end
  local pending = call('ZCARD', P .. 'pending')
  if pending > 0 then return { 'pending', pending } end
  return { 'idle' }
end
