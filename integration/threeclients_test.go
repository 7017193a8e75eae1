package integration

import (
	"context"
	"errors"
	"math"
	"math/rand/v2"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/nbd-export/nbd-export/client"
)

// clientDepth is how many requests a client has in flight.
const clientDepth = 3

// mixture is what a client does, in parts of 1000; the rest are writes.
type mixture struct {
	reads, zeroes, trims, flushes int
	fua                           int // of what writes, with FUA
	dies                          int // breaks its connection while requests are in flight
	moves                         int // says goodbye and goes to another exporter
	sectors                       int // most judged ones that a request reaches over
}

// mixtures, one for each client.
var mixtures = [trioClients]mixture{
	{reads: 150, moves: 1, sectors: 1},
	{reads: 150, moves: 1, sectors: trioSectors}, // takes long, and so is in flight when things happen
	{reads: 200, zeroes: 200, moves: 2, sectors: 8},
	{reads: 200, trims: 200, moves: 2, sectors: 8},
	{reads: 100, flushes: 100, fua: 500, moves: 1, sectors: 4},
	{reads: 900, moves: 5, sectors: 16},
	{reads: 150, zeroes: 50, trims: 50, dies: 20, sectors: 4},
	{reads: 300, zeroes: 20, trims: 20, flushes: 20, fua: 50, dies: 5, moves: 20, sectors: 24},
}

// trioClient is one connection, to any of the exporters, used by some workers;
// when it breaks it is dialled anew, there or elsewhere.
type trioClient struct {
	s *trio
	mixture

	mu   sync.Mutex
	rnd  *rand.Rand // of the choice of exporters
	conn *client.Conn
	to   *exporter
}

// client starts a client until ctx ends; histories are its workers'.
func (s *trio) client(ctx context.Context, n int, histories [][]event, wg *sync.WaitGroup) {
	who := uint64(s.rounds)<<32 | uint64(1+n)<<8
	c := &trioClient{s: s, mixture: mixtures[n], rnd: rand.New(rand.NewPCG(s.seed, who))}
	var workers sync.WaitGroup
	for w := range histories {
		rnd := rand.New(rand.NewPCG(s.seed, who|uint64(1+w)))
		workers.Go(func() { c.work(ctx, rnd, int16(n*clientDepth+w), &histories[w]) })
	}
	wg.Go(func() {
		workers.Wait()
		if c.conn != nil {
			c.conn.Close()
		}
	})
}

// dialled returns the connection, and to whom it is; nil at the end of ctx.
func (c *trioClient) dialled(ctx context.Context) (*client.Conn, *exporter) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for c.conn == nil {
		if ctx.Err() != nil {
			return nil, nil
		}
		e := c.s.sites[c.rnd.IntN(trioSites)].exporter()
		conn, err := client.Dial(ctx, nbdURI("", e.site.socket()), client.Options{})
		switch {
		case err != nil:
			time.Sleep(2 * time.Millisecond) // it may be dead, or not up yet
		case e.site.exporter() != e:
			conn.Abort() // it may be the next one
		default:
			c.conn, c.to = conn, e
		}
	}
	return c.conn, c.to
}

// leave ends a connection unless another worker has: with a goodbye, or as a
// dying client does.
func (c *trioClient) leave(conn *client.Conn, goodbye bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.conn != conn {
		return
	}
	c.conn = nil
	if goodbye {
		conn.Close()
	} else {
		conn.Abort()
	}
}

func (c *trioClient) work(ctx context.Context, rnd *rand.Rand, name int16, history *[]event) {
	s := c.s
	buf := make([]byte, (c.sectors-1)*trioStride+sectorSize)
	for ctx.Err() == nil {
		conn, to := c.dialled(ctx)
		if conn == nil {
			return
		}
		count := 1 + rnd.IntN(c.sectors)
		first := rnd.IntN(trioSectors - count + 1)
		off, length := int64(first)*trioStride, uint32((count-1)*trioStride+sectorSize)
		b := buf[:length]
		sector := func(i int) []byte { return b[i*trioStride:][:sectorSize] }
		e := event{Client: name, Via: to.via}
		fua := rnd.IntN(1000) < c.fua
		var flags uint16
		if fua {
			flags = client.FlagFUA
		}
		p := rnd.IntN(1000)
		is := func(share int) bool { p -= share; return p < 0 }
		var err error
		switch {
		case is(c.dies):
			c.leave(conn, false)
			continue
		case is(c.moves):
			c.leave(conn, true)
			continue
		case is(c.flushes):
			err = conn.Flush()
			s.expect(to, err, syscall.ESHUTDOWN)
		case is(c.reads):
			e.Kind, e.From = read, s.now()
			_, err = conn.ReadAt(b, off)
			e.To = s.now()
			s.expect(to, err, syscall.ESHUTDOWN)
			if err == nil {
				s.did.reads.Add(1)
				for i := range count {
					e.Sector, e.ID = int32(first+i), readSector(sector(i), first+i)
					if e.ID == torn {
						s.did.mixed.Add(1)
					}
					*history = append(*history, e)
				}
			}
		default:
			e.From = s.now()
			switch {
			case is(c.zeroes):
				if rnd.IntN(2) == 0 {
					flags |= client.FlagNoHole
				}
				err = conn.WriteZeroes(off, length, flags)
			case is(c.trims):
				e.Kind = trim
				err = conn.Trim(off, length, fua)
			default:
				e.ID = s.ids.Add(1)
				for i := range count {
					fillSector(sector(i), first+i, e.ID)
				}
				_, err = conn.WriteAt(b, off, fua)
			}
			e.To = s.now()
			s.expect(to, err, syscall.EPERM, syscall.ESHUTDOWN)
			var no *client.Error
			switch {
			case err == nil:
				s.did.acked.Add(1)
				to.acked.Add(1)
			case errors.As(err, &no):
				e.Outcome = refused
				s.did.refused.Add(1)
			default:
				e.Outcome, e.To = unknown, math.MaxInt64
				s.did.unknown.Add(1)
			}
			for i := range count {
				e.Sector = int32(first + i)
				*history = append(*history, e)
			}
		}
		var no *client.Error
		switch {
		case err == nil:
			if rnd.IntN(2) == 0 {
				time.Sleep(time.Duration(rnd.IntN(2000)) * time.Microsecond)
			}
		case errors.As(err, &no):
			time.Sleep(time.Duration(1+rnd.IntN(5)) * time.Millisecond)
			if rnd.IntN(20) == 0 {
				c.leave(conn, true) // perhaps another one is the owner
			}
		default:
			c.leave(conn, false)
		}
	}
}

// expect notes an error that should not happen to a client: an exporter refuses
// only with these, and ends a connection only when the test ends it.
func (s *trio) expect(to *exporter, err error, refusals ...syscall.Errno) {
	var no *client.Error
	switch {
	case err == nil, errors.Is(err, client.ErrClosed):
		return
	case errors.As(err, &no):
		if slices.Contains(refusals, no.Errno) {
			return
		}
	case to.ending.Load() && !errors.Is(err, client.ErrProtocol):
		return
	}
	if !s.condemned && s.odd.Add(1) <= 5 {
		s.t.Errorf("at %v a client of process %d got: %v", time.Since(s.start), to.via, err)
	}
}
