-- Taking and ending leases of single samples, and why there are none to take.

-- So many leases in a row may expire without a heartbeat: their answers may have been lost on the way to the replica.
local UNCOUNTED_LOSSES = 2
local LEASED = { [GENERATE] = GENERATING, [SCORE] = SCORING }

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
      if s[APPENDED_FROM] == NEVER_EXTENDED and s[LOST] < UNCOUNTED_LOSSES then
        s[LOST] = s[LOST] + 1
        give_back(g, i)
      elseif s[APPENDED_FROM] < 0 then
        count_failure(g, i, 'the lease expired without progress')
      else
        give_back(g, i)
      end
    end
  end
end

-- An answer in the making: at most `left` samples and, after the first one, `most` bytes.
local function new_handout(stage, owner, left, most, payload)
  return { stage = stage, owner = owner, left = left, most = most, payload = payload, bytes = 0, full = false,
           groups = {}, blobs = {}, granted = {} }
end

-- What is stored of the group's samples at these places: the prompt, then by place its sample, if the answer wants it.
local function stored_of(out, g, places)
  local fields = { 'prompt' }
  for k, i in ipairs(out.payload and places or {}) do fields[k + 1] = 's' .. (i - 1) end
  return call('HMGET', P .. 'p:' .. g.order, unpack(fields))
end

-- Leases a sample, if it is not leased yet, and grants it.
local function grant(out, g, i)
  local s = g.samples[i]
  if s[STATE] ~= LEASED[out.stage] then
    s[STATE], s[LEASE], s[OWNER], s[APPENDED_FROM] = LEASED[out.stage], next_lease(), out.owner, NEVER_EXTENDED
    touch(g)
  end
  call('ZADD', P .. 'lease:' .. out.stage, now + M.lease_ttl_ms, serial(g, i))
  out.granted[#out.granted + 1] = { g.order, i, s[LEASE] }
  return { i - 1, s[LEASE], s[ATTEMPT], facts(s) }
end

-- Adds a group to the answer. `blobs` come to `size` bytes.
local function add(out, g, samples, blobs, size, judge)
  out.bytes, out.left = out.bytes + size, math.max(0, out.left - #samples)
  out.groups[#out.groups + 1] = { g.order, g.ordinal, 0, samples, judge }
  for _, blob in ipairs(blobs) do out.blobs[#out.blobs + 1] = blob end
  return #samples
end

-- Puts samples of the group, by their places, into the answer as far as it has room, leasing those that are not leased
-- yet. Returns how many.
local function put(out, g, places)
  local stored = stored_of(out, g, places)
  local samples, blobs, size = {}, { stored[1] or '' }, #(stored[1] or '')
  for k, i in ipairs(places) do
    local s = g.samples[i]
    local partial, sample = s[SAVED] > 0 and call('GET', partial_key(g, i)) or '', stored[k + 1] or ''
    out.full = out.full or (#out.granted > 0 and out.bytes + size + #partial + #sample > out.most)
    if out.full then break end
    size = size + #partial + #sample
    samples[#samples + 1] = grant(out, g, i)
    blobs[#blobs + 1] = partial
    blobs[#blobs + 1] = sample
  end
  return #samples > 0 and add(out, g, samples, blobs, size, false) or 0
end

-- Puts all samples of a scored group into the answer, to be judged: the first one whatever its size.
local function take_whole(out, g)
  local places = {}
  for i, s in ipairs(g.samples) do
    if s[STATE] ~= DEAD then places[#places + 1] = i end
  end
  local stored = stored_of(out, g, places)
  local samples, blobs, size = {}, { stored[1] or '' }, #(stored[1] or '')
  for k, i in ipairs(places) do
    blobs[2 * k] = stored[k + 1] or ''
    blobs[2 * k + 1] = call('HGET', P .. 'p:' .. g.order, 'v' .. (i - 1)) or ''
    size = size + #blobs[2 * k] + #blobs[2 * k + 1]
  end
  if #out.granted > 0 and (#places > out.left or out.bytes + size > out.most) then return 0 end
  for k, i in ipairs(places) do
    samples[k] = grant(out, g, i)
    if size > out.most then blobs[2 * k] = '' end
  end
  return add(out, g, samples, blobs, size, true)
end

-- Leases samples of the group that are in `source`. Returns how many.
local function take(out, g, source)
  local places = {}
  for i, s in ipairs(g.samples) do
    if #places >= out.left then break end
    if s[STATE] == source then places[#places + 1] = i end
  end
  return #places > 0 and put(out, g, places) or 0
end

-- Leases all generated samples of the group together: the first group of an answer whatever its size. Its samples are
-- to be fetched.
local function take_together(out, g)
  local places = {}
  for i, s in ipairs(g.samples) do
    if s[STATE] == GENERATED then places[#places + 1] = i end
  end
  if #out.granted > 0 and #places > out.left then return 0 end
  local payload = out.payload
  out.payload = false
  local taken = put(out, g, places)
  out.payload = payload
  return taken
end

local function grant_of(out, request_id)
  local raw = request_id ~= '' and call('HGET', P .. 'grants', out.stage .. ':' .. out.owner)
  local grant = raw and cmsgpack.unpack(raw)
  return grant and grant[1] == request_id and grant[2] or {}
end

-- Puts what the replica still holds of an earlier answer to this request into the answer. Returns whether it does.
local function put_again(out, request_id)
  local orders, places = {}, {}
  for _, ref in ipairs(grant_of(out, request_id)) do
    local order, i, lease = unpack(ref)
    local g = group(order)
    if g and g.samples[i][STATE] == LEASED[out.stage] and g.samples[i][LEASE] == lease then
      if not places[order] then orders[#orders + 1], places[order] = order, {} end
      table.insert(places[order], i)
    end
  end
  for _, order in ipairs(orders) do
    local g, alive = group(order), 0
    for _, s in ipairs(g.samples) do
      if s[STATE] ~= DEAD then alive = alive + 1 end
    end
    if g.samples[places[order][1]][SCORE_LEASE] == 0 then
      put(out, g, places[order])
    elseif #places[order] == alive then
      take_whole(out, g)
    end
  end
  return #out.groups > 0
end

-- Remembers what the answer grants, beside what an earlier turn of the same request did.
local function remember(out, request_id, more)
  if request_id == '' or #out.granted == 0 then return end
  local refs = more and grant_of(out, request_id) or {}
  for _, ref in ipairs(out.granted) do refs[#refs + 1] = ref end
  call('HSET', P .. 'grants', out.stage .. ':' .. out.owner, cmsgpack.pack({ request_id, refs }))
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
  if behind() then return { 'push', M.step } end
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
