-- The orders that an earlier call with this request_id made, nil for none.
local function known_submit(request_id)
  local known = call('HGET', P .. 'submits', request_id)
  return known and cmsgpack.unpack(known)
end

-- The newest `kept` are remembered.
local function remember_submit(request_id, kept, orders)
  call('HSET', P .. 'submits', request_id, cmsgpack.pack(orders))
  if call('RPUSH', P .. 'submit_ids', request_id) > kept then
    call('HDEL', P .. 'submits', call('LPOP', P .. 'submit_ids'))
  end
end
