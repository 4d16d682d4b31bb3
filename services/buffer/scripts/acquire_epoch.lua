-- ARGV[1]: {known_epoch}. Fences every earlier trainer.
M.epoch = math.max(M.epoch, cmsgpack.unpack(ARGV[1])[1]) + 1
meta_changed = true
return answer({ M.epoch, M.step })
