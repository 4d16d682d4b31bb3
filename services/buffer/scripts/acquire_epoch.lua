-- Fences every earlier trainer.
M.epoch = M.epoch + 1
meta_changed = true
return answer({ M.epoch, M.step })
