-- ARGV[1]: {admit}. Counts every sample: open ones from their records, closed ones from the bitmaps.
local admit = cmsgpack.unpack(ARGV[1])[1]
local counts = {}
local pending, generated = false, false
for _, index in ipairs({ 'fresh', 'live', 'bound', 'rejected' }) do
  for _, m in ipairs(call('ZRANGE', P .. index, 0, -1)) do
    local g = group(tonumber(m))
    generated = generated or judgeable(g)
    for _, s in ipairs(g.samples) do
      local state = s[STATE]
      if state ~= DEAD then
        local row = counts[tostring(state)] or { 0, 0, 0 }
        local tokens = length(s)
        row[1], row[2] = row[1] + 1, row[2] + tokens
        if tokens > 0 then row[3] = row[3] + 1 end
        counts[tostring(state)] = row
        pending = pending or (state == PENDING and index ~= 'fresh')
        generated = generated or state == GENERATED
      end
    end
  end
end
for name, sums in pairs(M.sums) do
  counts[name] = { call('BITCOUNT', P .. 'b:' .. name), sums[1], sums[2] }
end

local waiting = {}
local live = occupied()
local can_start = M.pub_epoch > 0 and admit and room_left() > 0 and call('ZCARD', P .. 'fresh') > 0
if M.pub_epoch == 0 or not (pending or can_start) then
  waiting[tostring(GENERATE)] = why_no_generate(nil, nil, admit)
end
if not generated then waiting[tostring(SCORE)] = why_no_score() end
if M.batch_lease == 0 then
  local _, reason = plan_batch()
  waiting[tostring(TRAIN)] = reason
end
return answer({ M.accepted, counts, M.epoch, M.step, M.pub_epoch, M.pub_step, M.cursor, live, limit(), waiting,
                M.counters })
