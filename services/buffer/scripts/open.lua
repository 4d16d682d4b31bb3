-- ARGV[1]: the run's parameters. Creates the run or gives it new settings; answers what was there before.
-- More than are granted in the long run, and few enough for ids of 14 digits (policy.LEASES_PER_MS).
local LEASES_PER_MS = 16
local params = cmsgpack.unpack(ARGV[1])
local before = M
if not before then
  M = { cursor = 0, next_order = 0, accepted = 0, last_lease = 0, epoch = 0, step = 0, retired_step = 0, low_water = 0,
        pub_epoch = 0, pub_step = 0, floor_epoch = 0, floor_step = 0, batch_epoch = 0, batch_step = 0, batch_lease = 0,
        forks = {}, answers = {}, trained = {}, counters = {}, sums = {} }
  if params.leases_from_clock then M.last_lease = LEASES_PER_MS * now end
end
M.filtered = M.filtered or 0
local same = true
if before and before.next_order > 0 then
  for _, name in ipairs({ 'group_size', 'dataset_digest', 'seed' }) do same = same and M[name] == params[name] end
end
local had = before and { group_size = M.group_size, dataset_digest = M.dataset_digest, seed = M.seed } or params
if same then
  for name, value in pairs(params) do M[name] = value end
  meta_changed = true
end
return answer({ same = same, had = had })
