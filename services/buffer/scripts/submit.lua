-- ARGV[1]: {request_id, kept}; ARGV[2..]: prompts. Once per request_id, of which the newest `kept` are remembered.
local request_id, kept = unpack(cmsgpack.unpack(ARGV[1]))
local known = known_submit(request_id)
if known then return answer(known) end
local orders = {}
for k = 2, #ARGV do orders[#orders + 1] = new_group(-1, ARGV[k]) end
remember_submit(request_id, kept, orders)
return answer(orders)
