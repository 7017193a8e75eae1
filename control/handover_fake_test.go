package control

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"
)

// fakeStore is a storage that two fakeSides share.
type fakeStore struct {
	mu     sync.Mutex
	images []*fakeDisk
	noLock bool // locks keep nobody out
	double bool // two sides owned one image at once
}

// fakeDisk is an image and its owner record.
type fakeDisk struct {
	owners  []*fakeSide
	version int // of the content
	epoch   uint64
	nonce   string
}

func newFakeStore(n int) *fakeStore {
	s := &fakeStore{}
	for range n {
		s.images = append(s.images, &fakeDisk{})
	}
	return s
}

// trouble is what happens to an order.
type trouble string

const (
	fine       trouble = ""
	fails      trouble = "answers failure"
	half       trouble = "answers failure, the first was carried out" // QEMU's
	failsMute  trouble = "answers failure, and then never again"
	vanishes   trouble = "no answer, was not carried out"
	done       trouble = "no answer, was carried out"
	late       trouble = "no answer, arrives later"
	slow       trouble = "no answer, ends later"
	goneBefore trouble = "gone before it was carried out"
	goneAfter  trouble = "gone after it was carried out"
	goneWrote  trouble = "gone after it was carried out and wrote"
	mute       trouble = "never answers again, was not carried out"
	muteDone   trouble = "never answers again, was carried out"
	muteGone   trouble = "never answers again, ends later" // and has not carried it out
)

var errBroken = errors.New("it closed the connection before it answered")

// fakeSide is an exporter of all images of a store.
type fakeSide struct {
	name  string
	store *fakeStore
	plain bool
	// unsure: whether the process is gone cannot be told from here.
	unsure   bool
	trouble  map[string]trouble // by order: inactivate, activate, reactivate
	dead     bool
	silent   bool
	readOnly bool
	failed   State
	states   []State // overrides, for what is neither active nor inactive
	unusable string
	format   string
	size     int64
	noRecord bool
	boot     string
	dev      uint64
	pid      int

	// hook runs before an order is looked at.
	hook func(o Order)

	left    []int // versions when it let go
	pending []Order
	running []string
	void    []string
	orders  []string
}

func newFakeSide(name string, s *fakeStore, active bool) *fakeSide {
	f := &fakeSide{name: name, store: s, trouble: map[string]trouble{}, left: make([]int, len(s.images)), format: "raw", size: 1 << 20}
	if active {
		for _, d := range s.images {
			d.owners, d.epoch = []*fakeSide{f}, 1
		}
	}
	return f
}

func nodeName(i int) string { return "image" + string(rune('0'+i)) }

func (f *fakeSide) nodes() (names []string) {
	for i := range f.store.images {
		names = append(names, nodeName(i))
	}
	return names
}

func (f *fakeSide) Name() string   { return f.name }
func (f *fakeSide) Extended() bool { return !f.plain }
func (f *fakeSide) Gone() bool {
	f.store.mu.Lock()
	defer f.store.mu.Unlock()
	return f.dead && !f.unsure
}

// reach waits for an answer that does not come, or says that nobody is there.
func (f *fakeSide) reach(ctx context.Context) error {
	f.store.mu.Lock()
	silent, dead := f.silent, f.dead
	f.store.mu.Unlock()
	switch {
	case dead:
		return fmt.Errorf("no server answers at %s: %w", f.name, syscall.ECONNREFUSED)
	case silent:
		<-ctx.Done()
		return ctx.Err()
	}
	return nil
}

func (f *fakeSide) owns(d *fakeDisk) bool { return slices.Contains(d.owners, f) }

func (f *fakeSide) Status(ctx context.Context) (s Status, err error) {
	if err := f.reach(ctx); err != nil {
		return s, err
	}
	f.store.mu.Lock()
	defer f.store.mu.Unlock()
	s.PID = f.pid
	for i, d := range f.store.images {
		st := stateInactive
		if f.owns(d) {
			st = stateActive
		}
		if f.states != nil {
			st = f.states[i]
		}
		if f.failed != "" {
			st = f.failed
		}
		s.Images = append(s.Images, ImageStatus{Node: nodeName(i), Image: "/srv/" + nodeName(i), State: st, ReadOnly: f.readOnly, Epoch: d.epoch})
	}
	return s, nil
}

func (f *fakeSide) Identify(ctx context.Context, nonce string, nodes ...string) (list []Identity, err error) {
	if err := f.reach(ctx); err != nil {
		return nil, err
	}
	f.store.mu.Lock()
	defer f.store.mu.Unlock()
	for _, n := range nodes {
		if !slices.Contains(f.nodes(), n) {
			return nil, noNode(n)
		}
	}
	for i, d := range f.store.images {
		if len(nodes) > 0 && !slices.Contains(nodes, nodeName(i)) {
			continue
		}
		id := Identity{
			Node: nodeName(i), Export: "disk" + nodeName(i), Image: "/srv/" + nodeName(i), Format: f.format, Size: f.size, Active: f.owns(d), Unusable: f.unusable,
			BootID: f.boot, Dev: f.dev, Ino: uint64(i),
		}
		if !f.noRecord && !f.plain {
			id.Record = id.Image + ".owner"
			if nonce != "" && f.owns(d) {
				d.nonce, id.Noted = noteFor(nonce, id.Node), true
			}
			id.Nonce, id.Epoch = d.nonce, d.epoch
		}
		list = append(list, id)
	}
	return list, nil
}

func kindOf(o Order) string {
	switch {
	case !o.Active:
		return "inactivate"
	case o.Name[len(o.Name)-len("reactivate"):] == "reactivate":
		return "reactivate"
	}
	return "activate"
}

func (f *fakeSide) SetActive(ctx context.Context, o Order) error {
	if f.hook != nil {
		f.hook(o)
	}
	if err := f.reach(ctx); err != nil {
		return err
	}
	f.store.mu.Lock()
	defer f.store.mu.Unlock()
	f.orders = append(f.orders, kindOf(o))
	switch f.trouble[kindOf(o)] {
	case failsMute:
		f.silent = true
		fallthrough
	case fails:
		return generic("%s: it does not want to", f.name)
	case half:
		o.Nodes = []string{nodeName(0)}
		_ = f.apply(o)
		return generic("%s: only one of them", f.name)
	case vanishes:
		return errBroken
	case late:
		f.pending = append(f.pending, o)
		return errBroken
	case slow:
		f.running = append(f.running, o.Name)
		time.AfterFunc(3*time.Second, func() {
			f.store.mu.Lock()
			defer f.store.mu.Unlock()
			f.running, f.void = nil, nil // begun is begun
			_ = f.apply(o)
		})
		return errBroken
	case done:
		_ = f.apply(o)
		return errBroken
	case goneBefore:
		f.die()
		return errBroken
	case goneAfter, goneWrote:
		_ = f.apply(o)
		if f.trouble[kindOf(o)] == goneWrote {
			f.store.images[0].version++
		}
		f.die()
		return errBroken
	case muteDone:
		_ = f.apply(o)
		fallthrough
	case mute, muteGone:
		f.silent = true
		if f.trouble[kindOf(o)] == muteGone {
			time.AfterFunc(15*time.Second, func() { f.store.mu.Lock(); f.die(); f.store.mu.Unlock() })
		}
		f.store.mu.Unlock()
		<-ctx.Done()
		f.store.mu.Lock()
		return ctx.Err()
	}
	return f.apply(o)
}

func (f *fakeSide) die() {
	f.dead = true
	for _, d := range f.store.images {
		d.owners = slices.DeleteFunc(d.owners, func(o *fakeSide) bool { return o == f })
	}
}

func (f *fakeSide) apply(o Order) error {
	if slices.Contains(f.void, o.Name) {
		return generic("The order was taken back by who gave it (x-cancel)")
	}
	var on []int
	for i := range f.store.images {
		if o.Nodes == nil || slices.Contains(o.Nodes, nodeName(i)) {
			on = append(on, i)
		}
	}
	for _, i := range on {
		d := f.store.images[i]
		switch {
		case !o.Active || f.owns(d):
		case len(d.owners) > 0 && !f.store.noLock:
			return generic(`Failed to get "write" lock`)
		case o.IfUnchanged && d.version != f.left[i]:
			return generic("image was modified while inactive")
		}
	}
	for _, i := range on {
		d := f.store.images[i]
		switch {
		case o.Active && !f.owns(d):
			d.owners, d.nonce = append(d.owners, f), ""
			d.epoch++
			f.store.double = f.store.double || len(d.owners) > 1
		case !o.Active && f.owns(d):
			d.owners = slices.DeleteFunc(d.owners, func(o *fakeSide) bool { return o == f })
			f.left[i] = d.version
		}
	}
	return nil
}

// arrive carries out what was on its way.
func (f *fakeSide) arrive() {
	f.store.mu.Lock()
	defer f.store.mu.Unlock()
	for _, o := range f.pending {
		_ = f.apply(o)
	}
	f.pending = nil
}

func (f *fakeSide) TakeBack(ctx context.Context, o Order) (bool, error) {
	if f.plain {
		return false, nil
	}
	if err := f.reach(ctx); err != nil {
		return false, err
	}
	f.store.mu.Lock()
	defer f.store.mu.Unlock()
	f.void = append(f.void, o.Name)
	return slices.Contains(f.running, o.Name), nil
}

// owner names who owns all images: "a", "b", "" for nobody, "mixed".
func (s *fakeStore) owner(t testing.TB) string {
	t.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.double {
		t.Error("two sides owned one image")
	}
	var names []string
	for _, d := range s.images {
		name := ""
		if len(d.owners) > 0 {
			name = d.owners[0].name
		}
		names = append(names, name)
	}
	names = slices.Compact(names)
	if len(names) > 1 {
		return "mixed"
	}
	return names[0]
}
