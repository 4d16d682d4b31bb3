-- ARGV[1]: {orders}, the first one first.
local orders = cmsgpack.unpack(ARGV[1])[1]
call('UNLINK', P .. 'preferred')
for place, order in ipairs(orders) do call('ZADD', P .. 'preferred', place, member(order)) end
return answer({})
