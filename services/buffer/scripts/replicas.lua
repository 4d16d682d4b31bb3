-- ARGV[1]: {replica_id, ttl_ms}, or {} to list; ARGV[2]: a serialized Replica.
-- Answers the floor version; when listing, the blobs are the replicas in order of their ids.
local replica_id, ttl = unpack(cmsgpack.unpack(ARGV[1]))
if replica_id then
  call('HSET', P .. 'replicas', replica_id, cmsgpack.pack({ now + ttl, ARGV[2] }))
  return answer({ M.floor_epoch, M.floor_step })
end
local ids, entries = {}, {}
local stored = call('HGETALL', P .. 'replicas')
for at = 1, #stored, 2 do
  local entry = cmsgpack.unpack(stored[at + 1])
  if entry[1] <= now then
    call('HDEL', P .. 'replicas', stored[at])
    call('HDEL', P .. 'grants', GENERATE .. ':' .. stored[at], SCORE .. ':' .. stored[at])
  else
    ids[#ids + 1] = stored[at]
    entries[stored[at]] = entry[2]
  end
end
table.sort(ids)
local blobs = {}
for k, id in ipairs(ids) do blobs[k] = entries[id] end
return answer({}, blobs)
