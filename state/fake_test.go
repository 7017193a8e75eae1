package state

import (
	"context"
	"flag"
	"fmt"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) {
	_ = flag.Set("rapid.checks", "400") // unless the command line says otherwise
	goleak.VerifyTestMain(m)
}

// testError is an error of a fake image.
type testError struct {
	text         string
	sync, fenced bool
}

func (e *testError) Error() string    { return e.text }
func (e *testError) SyncFailed() bool { return e.sync }
func (e *testError) Fenced() bool     { return e.fenced }

var (
	errIO    = &testError{text: "no space left on device"}
	errSync  = &testError{text: "fdatasync: input/output error", sync: true}
	errFence = &testError{text: "owner record has epoch 9", fenced: true}
	errBusy  = &testError{text: `Failed to get "write" lock`}
)

// trace records the calls to a set of images.
type trace struct {
	mu    sync.Mutex
	calls []string
}

func (t *trace) add(s string) {
	t.mu.Lock()
	t.calls = append(t.calls, s)
	t.mu.Unlock()
}

// take returns the calls since the last take.
func (t *trace) take() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	s := strings.Join(t.calls, " ")
	t.calls = nil
	return s
}

// view is what requests look at: the descriptors behind the image.
type view struct {
	writable bool
	users    atomic.Int64
	closed   atomic.Bool
}

func (v *view) close() {
	v.closed.Store(true)
	if v.users.Load() != 0 {
		panic("a view is closed while a request uses it")
	}
}

func (v *view) use(f func()) {
	v.users.Add(1)
	if v.closed.Load() {
		panic("a request uses a closed view")
	}
	f()
	if v.closed.Load() {
		panic("a view was closed under a request")
	}
	v.users.Add(-1)
}

// disk is an image file, its advisory lock included, as several processes
// share it.
type disk struct {
	owner atomic.Pointer[fakeImage]
	epoch atomic.Uint64 // owner record
	mu    sync.Mutex
	data  map[int]bool // durable writes
}

func newDisk() *disk { return &disk{data: make(map[int]bool)} }

// fakeImage checks that it is used as Image says, and panics if not.
type fakeImage struct {
	name     string
	dev, ino uint64
	disk     *disk
	trace    *trace

	mu   sync.Mutex
	fail map[string][]error      // by method, for its next calls
	at   map[string]func() error // by method: called in it
	busy string                  // the transition method under way

	onSync func(context.Context) error // carries out SyncAhead

	checks   atomic.Int64 // Checks under way
	checked  atomic.Int64 // Checks so far
	noChecks atomic.Bool

	// Of transition methods only.
	acquired, loaded, settled, closed bool
	claimed                           bool
	before                            uint64 // epoch in the record before the claim
	abandoned, published              bool   // published: the other view is in place
	ifUnchanged                       bool   // as the last Load was told
	next, old                         *view

	current atomic.Pointer[view]
	alone   atomic.Bool  // a method runs beside which nothing but reads may
	frozen  atomic.Bool  // nothing may become dirty
	writers atomic.Int64 // write-class requests under way

	dirtyMu sync.Mutex
	dirty   []int // acknowledged, not durable
	lost    []int // given up
}

func newFake(name string, ino uint64, tr *trace) *fakeImage {
	f := &fakeImage{
		name: name, dev: 1, ino: ino, disk: newDisk(), trace: tr,
		fail: make(map[string][]error), at: make(map[string]func() error),
	}
	f.current.Store(&view{})
	return f
}

// failNext makes the next call of method fail.
func (f *fakeImage) failNext(method string, err error) {
	f.mu.Lock()
	f.fail[method] = append(f.fail[method], err)
	f.mu.Unlock()
}

// on has fn called in each call of method; nil ends that.
func (f *fakeImage) on(method string, fn func() error) {
	f.mu.Lock()
	f.at[method] = fn
	f.mu.Unlock()
}

func (f *fakeImage) must(ok bool, what string) {
	if !ok {
		panic("image " + f.name + ": " + what)
	}
}

// enter begins a transition method; the method ends with f.leave. It returns
// the error that the test wants.
func (f *fakeImage) enter(method string) error {
	f.mu.Lock()
	f.must(f.busy == "", method+" while "+f.busy+" runs")
	f.busy = method
	if method != "SyncAhead" && method != "Retire" {
		f.alone.Store(true)
		f.must(f.writers.Load() == 0, method+" beside requests")
	}
	var err error
	if q := f.fail[method]; len(q) > 0 {
		err, f.fail[method] = q[0], q[1:]
	}
	at := f.at[method]
	f.mu.Unlock()
	f.must(!f.closed, method+" after Close")
	if f.trace != nil {
		f.trace.add(f.name + "." + method)
	}
	if at != nil {
		if e := at(); err == nil {
			err = e
		}
	}
	runtime.Gosched()
	return err
}

func (f *fakeImage) leave() {
	f.mu.Lock()
	f.busy = ""
	f.alone.Store(false)
	f.mu.Unlock()
}

func (f *fakeImage) Key() (dev, ino uint64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.must(f.busy == "", "Key while "+f.busy+" runs")
	return f.dev, f.ino
}

func (f *fakeImage) Name() string { return f.name }

func (f *fakeImage) SyncAhead(ctx context.Context) error {
	defer f.leave()
	err := f.enter("SyncAhead")
	f.must(f.owns() && !f.settled, "SyncAhead of an image that is not active")
	if f.onSync != nil {
		if e := f.onSync(ctx); e != nil {
			err = e
		}
	}
	if err != nil {
		return err
	}
	if ctx.Err() != nil {
		return fmt.Errorf("sync ahead: %w", ctx.Err())
	}
	f.sync()
	return nil
}

func (f *fakeImage) owns() bool { return f.acquired && f.disk.owner.Load() == f }

func (f *fakeImage) sync() {
	f.dirtyMu.Lock()
	defer f.dirtyMu.Unlock()
	f.must(f.disk.owner.Load() == f, "written without its lock")
	f.disk.mu.Lock()
	for _, id := range f.dirty {
		f.disk.data[id] = true
	}
	f.disk.mu.Unlock()
	f.dirty = nil
}

func (f *fakeImage) Settle() error {
	defer f.leave()
	err := f.enter("Settle")
	f.must(f.owns() && !f.settled, "Settle of an image that is not active")
	if err != nil {
		return err
	}
	f.sync()
	f.settled = true
	f.frozen.Store(true)
	f.next = &view{}
	return nil
}

func (f *fakeImage) Unsettle() error {
	defer f.leave()
	err := f.enter("Unsettle")
	f.must(f.settled && !f.published, "Unsettle before Settle")
	f.settled, f.next = false, nil
	f.frozen.Store(false)
	return err
}

func (f *fakeImage) PublishInactive() {
	defer f.leave()
	_ = f.enter("PublishInactive")
	f.must((f.settled || f.abandoned) && !f.published, "PublishInactive before Settle and Abandon")
	f.old = f.current.Swap(f.next)
	f.published = true
}

func (f *fakeImage) Release() error {
	defer f.leave()
	f.noChecks.Store(true)
	err := f.enter("Release")
	f.must(f.checks.Load() == 0, "Release beside Check")
	f.must(f.published, "Release before PublishInactive")
	f.old.close()
	f.old, f.next = nil, nil
	f.must(f.disk.owner.CompareAndSwap(f, nil), "Release without the lock")
	f.acquired, f.loaded, f.claimed, f.settled, f.abandoned, f.published = false, false, false, false, false, false
	f.noChecks.Store(false)
	return err
}

func (f *fakeImage) Acquire() error {
	defer f.leave()
	err := f.enter("Acquire")
	f.must(!f.acquired, "Acquire twice")
	if err != nil {
		return err
	}
	if !f.disk.owner.CompareAndSwap(nil, f) {
		return errBusy
	}
	f.acquired = true
	return nil
}

func (f *fakeImage) Load(ifUnchanged bool) error {
	defer f.leave()
	f.ifUnchanged = ifUnchanged
	err := f.enter("Load")
	f.must(f.owns() && !f.loaded, "Load without the lock")
	f.loaded = err == nil
	f.next = &view{writable: true}
	return err
}

func (f *fakeImage) Claim(own uint64) (uint64, error) {
	defer f.leave()
	err := f.enter("Claim")
	f.must(f.owns() && f.loaded && !f.claimed, "Claim before Load")
	if err != nil {
		return 0, err
	}
	f.before, f.claimed = f.disk.epoch.Load(), true
	f.disk.epoch.Store(max(f.before, own) + 1)
	return f.disk.epoch.Load(), nil
}

func (f *fakeImage) PublishActive() {
	defer f.leave()
	_ = f.enter("PublishActive")
	f.must(f.claimed, "PublishActive before Claim")
	f.old = f.current.Swap(f.next)
	f.next = nil
	f.frozen.Store(false)
}

func (f *fakeImage) Withdraw() {
	defer f.leave()
	_ = f.enter("Withdraw")
	f.must(f.acquired && f.old == nil, "Withdraw of what is not acquired")
	if f.claimed {
		f.disk.epoch.Store(f.before)
	}
	f.must(f.disk.owner.CompareAndSwap(f, nil), "Withdraw without the lock")
	f.acquired, f.loaded, f.claimed, f.next = false, false, false, nil
}

func (f *fakeImage) Retire() {
	defer f.leave()
	f.noChecks.Store(true)
	_ = f.enter("Retire")
	f.must(f.checks.Load() == 0, "Retire beside Check")
	f.must(f.old != nil, "Retire before PublishActive")
	f.old.close()
	f.old = nil
	f.noChecks.Store(false)
}

func (f *fakeImage) Check() error {
	f.checks.Add(1)
	defer f.checks.Add(-1)
	f.checked.Add(1)
	f.must(!f.noChecks.Load(), "Check beside Release, Retire or Close")
	f.must(f.disk.owner.Load() == f, "Check of an image that is not owned")
	f.mu.Lock()
	var err error
	if q := f.fail["Check"]; len(q) > 0 {
		err, f.fail["Check"] = q[0], q[1:]
	}
	at := f.at["Check"]
	f.mu.Unlock()
	if at != nil {
		if e := at(); err == nil {
			err = e
		}
	}
	f.must(!f.noChecks.Load(), "Check beside Release, Retire or Close")
	return err
}

func (f *fakeImage) Abandon() error {
	defer f.leave()
	err := f.enter("Abandon")
	f.frozen.Store(true)
	f.must(f.acquired && !f.published, "Abandon of what is not acquired")
	f.dirtyMu.Lock()
	f.lost, f.dirty = append(f.lost, f.dirty...), nil
	f.dirtyMu.Unlock()
	f.abandoned, f.next = true, &view{}
	return err
}

func (f *fakeImage) Close() error {
	defer f.leave()
	f.noChecks.Store(true)
	err := f.enter("Close")
	f.must(f.checks.Load() == 0, "Close beside Check")
	f.must(f.old == nil, "Close with an old view")
	f.current.Load().close()
	if f.acquired {
		f.must(f.disk.owner.CompareAndSwap(f, nil), "Close without the lock")
		f.dirtyMu.Lock()
		f.lost, f.dirty = append(f.lost, f.dirty...), nil
		f.dirtyMu.Unlock()
	}
	f.acquired, f.closed = false, true
	return err
}

// request carries out an admitted request of class c; id names a write, which
// is acknowledged when it returns.
func (f *fakeImage) request(c Class, id int) {
	f.writers.Add(1)
	allowed := func() {
		f.must(!f.alone.Load(), "a request beside a method that drains")
		f.must(c == Query || !f.frozen.Load(), "a request that changes a settled image")
	}
	allowed()
	f.current.Load().use(func() {
		runtime.Gosched()
		if c == Query {
			return
		}
		f.must(f.current.Load().writable, "a write through a read-only view")
		if c == Flush {
			f.sync()
			return
		}
		f.dirtyMu.Lock()
		f.must(f.disk.owner.Load() == f, "a write without the lock")
		f.dirty = append(f.dirty, id)
		f.dirtyMu.Unlock()
		runtime.Gosched()
		f.must(f.disk.owner.Load() == f, "a write lost its lock")
	})
	allowed()
	f.writers.Add(-1)
}

func (f *fakeImage) read() { f.current.Load().use(runtime.Gosched) }

// rig is a set of machines over fake images.
type rig struct {
	trace *trace
	imgs  []*fakeImage
	ms    []*Machine
	lanes []*Lane

	mu     sync.Mutex
	at     map[Step]func(image string)
	events []Transition
	steps  []string
	wakes  map[string]int
}

// newRig makes machines with these names, inactive, keys in their order. Unless
// t is nil they are stopped at its end.
func newRig(t testing.TB, opt Options, names ...string) *rig {
	r := &rig{trace: new(trace), at: make(map[Step]func(string)), wakes: make(map[string]int)}
	opt.Observe = func(t Transition) {
		r.mu.Lock()
		r.events = append(r.events, t)
		r.mu.Unlock()
	}
	opt.Step = func(image string, s Step) {
		r.mu.Lock()
		f := r.at[s]
		r.steps = append(r.steps, image+":"+string(s))
		r.mu.Unlock()
		if f != nil {
			f(image)
		}
	}
	for i, n := range names {
		img := newFake(n, uint64(i), r.trace)
		m := NewMachine(img, opt)
		r.imgs, r.ms = append(r.imgs, img), append(r.ms, m)
		r.lanes = append(r.lanes, m.Lane(func() {
			r.mu.Lock()
			r.wakes[n]++
			r.mu.Unlock()
		}, nil))
	}
	if t != nil {
		t.Cleanup(func() { _ = Stop(r.ms...) })
	}
	return r
}

// on has f called at the start of step s of any image; nil ends that.
func (r *rig) on(s Step, f func(image string)) {
	r.mu.Lock()
	r.at[s] = f
	r.mu.Unlock()
}

// pauseAt stops the first image that comes to step s until goOn is called; there
// is closed when it has come.
func (r *rig) pauseAt(s Step) (there <-chan struct{}, goOn func()) {
	in, out := make(chan struct{}), make(chan struct{})
	var once sync.Once
	r.on(s, func(string) {
		once.Do(func() {
			close(in)
			<-out
		})
	})
	return in, func() { close(out) }
}

func (r *rig) takeSteps() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	s := strings.Join(r.steps, " ")
	r.steps = nil
	return s
}

func (r *rig) takeEvents() []Transition {
	r.mu.Lock()
	defer r.mu.Unlock()
	e := r.events
	r.events = nil
	return e
}

// states lists the states of all machines, in their order.
func (r *rig) states() string {
	var s []string
	for _, m := range r.ms {
		s = append(s, m.Status().State.String())
	}
	return strings.Join(s, " ")
}

// gates lists what the gates answer to Mutate, Query, Flush.
func (r *rig) gates() string {
	var s []string
	for _, l := range r.lanes {
		s = append(s, ask(l))
	}
	return strings.Join(s, " ")
}

// ask writes a gate's answers to Mutate, Query and Flush as letters: Admitted,
// Wait, Nothing, Refused, Hold, Lost, laTe, Dropped.
func ask(l *Lane) string {
	var s string
	for _, c := range []Class{Mutate, Query, Flush} {
		v := l.Enter(c)
		if v == Admitted {
			l.Leave()
		}
		s += string("AWNRHLTD"[v])
	}
	return s
}

// forget drops what has been recorded so far.
func (r *rig) forget() {
	r.trace.take()
	r.takeSteps()
	r.takeEvents()
	r.mu.Lock()
	clear(r.wakes)
	r.mu.Unlock()
}

func check(t testing.TB, what, got, want string) {
	t.Helper()
	if got != want {
		t.Errorf("%s:\n got %s\nwant %s", what, got, want)
	}
}

func noError(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func errText(err error) string {
	if err == nil {
		return "ok"
	}
	return err.Error()
}
