-- ARGV[1]: {replica_id, max_samples, epoch, step, admit, request_id, more, max_bytes}; `more`: a later turn of the
-- request. Blobs: per group its prompt, then per sample partial, ''. Answers last whether something is left over.
local owner, left, epoch, step, admit, request_id, more, most = unpack(cmsgpack.unpack(ARGV[1]))
take_back_expired(GENERATE)
reindex()
local out = new_handout(GENERATE, owner, left, most, false)
if not more and put_again(out, request_id) then
  return answer({ out.groups, {}, closed_groups, M.cursor, {}, true }, out.blobs)
end
local refused = refuses(epoch, step)
if refused then return answer({ {}, refused, closed_groups, M.cursor, {} }) end

for _, m in ipairs(call('ZRANGE', P .. 'preferred', 0, -1)) do
  if out.left == 0 or out.full then break end
  if call('ZSCORE', P .. 'pending', m) then take(out, group(tonumber(m)), PENDING) end
end
for _, m in ipairs(listed('pending', left)) do
  if out.left == 0 or out.full then break end
  take(out, group(tonumber(m)), PENDING)
end

local room = room_left()
if not admit or out.full then room = 0 end
local fresh = out.left > 0 and room > 0 and listed('fresh', math.min(room, out.left)) or {}
for _, m in ipairs(fresh) do
  local g = group(tonumber(m))
  if out.left == 0 or take(out, g, PENDING) == 0 then break end
  g.birth_epoch, g.birth_step = M.pub_epoch, M.pub_step
  call('ZREM', P .. 'fresh', m)
  call('ZADD', P .. 'live', effective(g.birth_epoch, g.birth_step), m)
  room = room - 1
end

local wanted = {}
local missing = out.full and 0 or math.min(math.ceil(out.left / M.group_size), room)
if missing > 0 then
  local ordinal = M.cursor
  while #wanted < math.max(missing, M.batch_groups) do
    if not call('ZSCORE', P .. 'closed', string.format('%d', ordinal)) then wanted[#wanted + 1] = ordinal end
    ordinal = ordinal + 1
  end
end
remember(out, request_id, more)
reindex()
local left_over = out.full or call('ZCARD', P .. 'pending') > 0 or (out.left == 0 and room > 0)
local waiting = #out.groups == 0 and why_no_generate(epoch, step, admit) or {}
return answer({ out.groups, waiting, closed_groups, M.cursor, wanted, left_over }, out.blobs)
