-- ARGV[1]: {replica_id, max_samples, epoch, step, admit}. Blobs: per group its prompt, then per sample partial, ''.
local owner, left, epoch, step, admit = unpack(cmsgpack.unpack(ARGV[1]))
take_back_expired(GENERATE)
reindex()
local refused = refuses(epoch, step)
if refused then return answer({ {}, refused, closed_groups, M.cursor, {} }) end

local leased, blobs = {}, {}
for _, m in ipairs(listed('pending', left)) do
  if left == 0 then break end
  left = left - take(group(tonumber(m)), GENERATE, PENDING, GENERATING, owner, left, leased, blobs, false)
end

local room = math.max(0, limit() - occupied())
if not admit then room = 0 end
local fresh = left > 0 and room > 0 and listed('fresh', math.min(room, left)) or {}
for _, m in ipairs(fresh) do
  if left == 0 then break end
  local g = group(tonumber(m))
  g.birth_epoch, g.birth_step = M.pub_epoch, M.pub_step
  call('ZREM', P .. 'fresh', m)
  call('ZADD', P .. 'live', effective(g.birth_epoch, g.birth_step), m)
  room = room - 1
  left = left - take(g, GENERATE, PENDING, GENERATING, owner, left, leased, blobs, false)
end

local wanted = {}
local missing = math.min(math.ceil(left / M.group_size), room)
if missing > 0 then
  local ordinal = M.cursor
  while #wanted < math.max(missing, M.batch_groups) do
    if not call('ZSCORE', P .. 'closed', string.format('%d', ordinal)) then wanted[#wanted + 1] = ordinal end
    ordinal = ordinal + 1
  end
end
local waiting = #leased == 0 and why_no_generate(epoch, step, admit) or {}
return answer({ leased, waiting, closed_groups, M.cursor, wanted }, blobs)
