package bench

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/nbd-export/nbd-export/client"
	"github.com/nbd-export/nbd-export/internal/bytesize"
)

// Config is one load: what to do to which export, and for how long.
type Config struct {
	URI   string // of the export, as client.ParseURI reads it
	Label string // added to the name of the Go benchmark line

	RW          string // one of Modes
	ReadPercent int    // of mixed: 0 to 100
	BlockSize   int64  // bytes of each operation, 1 to 32M
	Depth       int    // operations in flight per connection
	Conns       int    // connections

	Time time.Duration // 0: no bound
	Ops  int64         // operations of all connections together; 0: no bound
	Rate float64       // operations/s of all connections together; 0: as fast as possible

	Offset int64 // where the region begins, bytes
	Size   int64 // of the region, bytes; 0: to the export's end

	FUA        bool  // on every write
	FlushEvery int64 // a FLUSH after so many writes of a connection; 0: none

	// Verify writes blocks that say where, when and by whom they were written,
	// and checks what is read, during the load and after it. Loads that only read
	// check what such a load has left; blocks of zeroes are then not counted.
	Verify bool
	Seed   uint64 // of offsets and patterns

	PID           int  // of the server, for its processor time; 0: unknown
	IgnoreEPERM   bool // count refused operations instead of stopping
	SimpleReplies bool // do not negotiate structured replies

	// Discard throws the payloads of reads of 64 KiB or more away without copying
	// them out of the socket. What large reads measure is then the server, and not
	// this client's copy, which a user's client has to make as well.
	Discard bool

	// Progress, if not nil, hears how it goes a few times a second.
	Progress func(Progress) `json:"-"`
}

// Modes are the values of Config.RW.
var Modes = []string{"read", "write", "randread", "randwrite", "mixed"}

// maxBlock is the largest request of the protocol.
const maxBlock = client.MaxRequest

// Check says what is wrong with c, as far as that can be told without a server.
func (c *Config) Check() error {
	if _, err := client.ParseURI(c.URI); err != nil {
		return err
	}
	switch {
	case !slices.Contains(Modes, c.RW):
		return fmt.Errorf("unknown load %q: want one of %s", c.RW, strings.Join(Modes, ", "))
	case c.ReadPercent < 0 || c.ReadPercent > 100:
		return fmt.Errorf("read percentage %d: want 0 to 100", c.ReadPercent)
	case c.BlockSize < 1 || c.BlockSize > maxBlock:
		return fmt.Errorf("block size %d: want 1 to %s", c.BlockSize, bytesize.Format(maxBlock))
	case c.Depth < 1 || c.Depth > client.MaxDepth:
		return fmt.Errorf("depth %d: want 1 to %d", c.Depth, client.MaxDepth)
	case c.Conns < 1 || c.Conns > 4096:
		return fmt.Errorf("%d connections: want 1 to 4096", c.Conns)
	case c.Time < 0 || c.Ops < 0 || c.Offset < 0 || c.Size < 0 || c.FlushEvery < 0 || c.PID < 0:
		return errors.New("time, operations, offset, size, flush interval and process id must not be negative")
	case !(c.Rate >= 0 && c.Rate <= 1e9):
		return fmt.Errorf("rate %g: want 0 to 1e9 operations/s", c.Rate)
	case c.Time == 0 && c.Ops == 0:
		return errors.New("neither a time nor a number of operations is given: the load would never end")
	case c.Verify && c.Discard:
		return errors.New("what is discarded cannot be verified: give one of the two")
	case c.Verify && c.BlockSize%sectorSize != 0:
		return fmt.Errorf("block size %d: verifying needs a multiple of %d", c.BlockSize, sectorSize)
	}
	return nil
}

func (c *Config) reads() bool {
	return c.RW == "read" || c.RW == "randread" || (c.RW == "mixed" && c.ReadPercent > 0)
}

func (c *Config) writes() bool {
	return c.RW == "write" || c.RW == "randwrite" || (c.RW == "mixed" && c.ReadPercent < 100)
}

func (c *Config) sequential() bool { return c.RW == "read" || c.RW == "write" }

// kind names the load in results: mixed70 for seventy per cent of reads.
func (c *Config) kind() string {
	if c.RW == "mixed" {
		return fmt.Sprintf("mixed%d", c.ReadPercent)
	}
	return c.RW
}

// region checks c against what the server said, and returns the first block and
// the number of blocks of the region, in units of the block size.
func (c *Config) region(info client.Info) (first, blocks int64, err error) {
	fail := func(format string, args ...any) (int64, int64, error) {
		return 0, 0, fmt.Errorf("%s: "+format, append([]any{c.URI}, args...)...)
	}
	bs := c.BlockSize
	if info.Size > 1<<63-1 {
		return fail("export of %d bytes is too large", info.Size)
	}
	size := int64(info.Size)
	switch {
	case c.writes() && info.ReadOnly():
		return fail("export is read-only, load %s writes", c.RW)
	case c.writes() && c.FUA && !info.CanFUA():
		return fail("server does not offer FUA")
	case c.FlushEvery > 0 && !info.CanFlush():
		return fail("server does not offer FLUSH")
	case info.MaxBlock != 0 && bs > int64(info.MaxBlock):
		return fail("block size %s is above the server's maximum of %s", bytesize.Format(bs), bytesize.Format(int64(info.MaxBlock)))
	case info.MinBlock > 1 && (bs%int64(info.MinBlock) != 0 || c.Offset%int64(info.MinBlock) != 0):
		return fail("block size and offset must be multiples of the server's minimum of %s", bytesize.Format(int64(info.MinBlock)))
	case c.Offset%bs != 0:
		return fail("offset %d is not a multiple of the block size %s", c.Offset, bytesize.Format(bs))
	case c.Offset > size || c.Size > size-c.Offset:
		return fail("region of %d bytes at %d reaches past the export's end at %d", c.Size, c.Offset, size)
	}
	length := c.Size
	if length == 0 {
		length = size - c.Offset
	}
	first, blocks = c.Offset/bs, length/bs
	switch {
	case blocks == 0:
		return fail("region of %d bytes holds no block of %s", length, bytesize.Format(bs))
	case c.split() && blocks < int64(c.Conns):
		return fail("region of %d blocks cannot be divided among %d connections", blocks, c.Conns)
	case c.Verify && c.writes() && blocks > maxLedger:
		return fail("region of %d blocks is too large to verify, at most %d: give a smaller one by its size", blocks, maxLedger)
	}
	return first, blocks, nil
}

// split says whether each connection has a part of the region of its own.
func (c *Config) split() bool { return c.sequential() || c.Verify }
