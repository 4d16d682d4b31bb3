-- ARGV[1]: {request_id}; ARGV[2..]: prompts. Once per request_id.
local request_id = cmsgpack.unpack(ARGV[1])[1]
local known = call('HGET', P .. 'submits', request_id)
if known then return answer(cmsgpack.unpack(known)) end
local orders = {}
for k = 2, #ARGV do orders[#orders + 1] = new_group(-1, ARGV[k], false) end
call('HSET', P .. 'submits', request_id, cmsgpack.pack(orders))
return answer(orders)
