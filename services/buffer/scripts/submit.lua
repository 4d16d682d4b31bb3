-- ARGV[1]: {request_id, kept}; ARGV[2..]: prompts. Once per request_id, of which the newest `kept` are remembered.
local request_id, kept = unpack(cmsgpack.unpack(ARGV[1]))
local known = call('HGET', P .. 'submits', request_id)
if known then return answer(cmsgpack.unpack(known)) end
local orders = {}
for k = 2, #ARGV do orders[#orders + 1] = new_group(-1, ARGV[k], false) end
call('HSET', P .. 'submits', request_id, cmsgpack.pack(orders))
if call('RPUSH', P .. 'submit_ids', request_id) > kept then
  call('HDEL', P .. 'submits', call('LPOP', P .. 'submit_ids'))
end
return answer(orders)
