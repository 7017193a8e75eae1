// Package qcow2 is the qcow2 image format: where the bytes of a guest range
// lie in host files, and how that changes. It reads and writes tables; the
// guest's bytes are moved by its caller, who gets extents of host files from
// Map and Prepare. It knows no locks, no owners, no protocol and not which
// file is which: package backend gives it open Files.
//
// The format is that of QEMU's docs/interop/qcow2.rst; functions name the
// section they follow. Numbers in the format are big-endian; in this package
// they are decoded, except where a comment says otherwise.
//
// # What an Image promises
//
//   - A crash at any moment leaves at worst leaked clusters, never a cluster
//     used twice, never a mapped cluster with another block's bytes.
//   - A write is visible to Map when Commit has returned and durable when a
//     Flush that began later has.
//   - Host clusters that Map and Prepare return keep their bytes and their
//     meaning until Unmap, Commit or Abort: what is freed meanwhile is neither
//     punched nor used again before.
//   - An Image that was not begun (Begin) writes nothing, whatever is called, and
//     one that was closed says of nothing that it is durable.
//   - Odd metadata never panics, loops or reaches outside the files. Before
//     Begin it is staleness: that read gets EIO and nothing more happens.
//     After Begin it also refuses writes and sets the corrupt bit.
//
// # Flush
//
// In this order, each step only when the one before it is on disk:
//
//  1. Copy the dirty tables. What is committed later belongs to the next
//     flush; who arrives before this point joins, who arrives after it waits
//     for the next.
//  2. Write refcount blocks, then the refcount table where blocks are new
//     (a sync in between); sync the image and the data file, which makes the
//     guest's bytes of all commits before (1) durable too. Have the header name a
//     refcount table that is in a new place; sync.
//  3. Write the copies of L2 tables; sync; write L1 entries of new tables;
//     sync.
//  4. Now apply the decrements of clusters that no table names any more, and
//     give them back: punched first where the file can, and only when nobody
//     pins them. The decrements themselves are written by the next flush: a
//     crash before that leaks.
//
// A step that fails leaves everything dirty that was, so that the next flush
// does it again. A failed sync is the File's to remember, which is why Sync
// fails for ever once it did.
//
// # Memory
//
// An image takes at most, whatever its tables say: 64 MiB for the L1 table and
// the directories of tables in memory, Options.L2Cache for these (more only while
// so many are dirty), 8 MiB for the refcount table and 8 MiB for clean refcount
// blocks, 3 MiB for runs of free clusters, 1 MiB or one cluster of decompressed
// ones, and 250 MiB for the set of clusters that metadata is in, which takes 40
// bytes for each of them where they are far apart: 100 KiB for a disk of 1 TiB with
// clusters of 64 KiB. All of that disk's L2 tables are 128 MiB, and take 131.
package qcow2
