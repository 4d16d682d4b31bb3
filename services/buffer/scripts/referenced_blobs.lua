-- ARGV[1]: digests. Answers those that a sample's payload refers to.
local found = {}
for _, digest in ipairs(cmsgpack.unpack(ARGV[1])) do
  if call('HEXISTS', P .. 'blobs', digest) == 1 then found[#found + 1] = digest end
end
return answer(found)
