package control

import (
	"bytes"
	"errors"
	"regexp"
	"strings"
	"testing"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"github.com/nbd-export/nbd-export/ioloop"
	"github.com/nbd-export/nbd-export/state"
)

// onDisk is a failure after which nothing is lost.
type onDisk struct{}

func (onDisk) Error() string { return "all is on disk" }
func (onDisk) Durable() bool { return true }

func TestConsole(t *testing.T) {
	var b bytes.Buffer
	log, err := NewLogger(zapcore.AddSync(&b), "info", "console", false)
	if err != nil {
		t.Fatal(err)
	}
	opt := Observe(state.Options{}, log)
	opt.Observe(state.Transition{
		Image: "/srv/my disk", Event: state.Published, From: state.Activating, To: state.Active, Epoch: 3, Duration: 1234567,
	})
	opt.Observe(state.Transition{
		Image: "/srv/d", Event: state.InactivateFailed, From: state.Inactivating, To: state.Active, Epoch: 3,
		Duration: 12345678901, Err: errors.New("no \"space\"\nleft"),
	})
	opt.Observe(state.Transition{Image: "/srv/d", Event: state.Released, From: state.Inactivating, To: state.Inactive, Err: errors.New("x")})
	opt.Observe(state.Transition{Image: "/srv/d", Event: state.Released, From: state.Inactivating, To: state.Inactive, Err: onDisk{}})
	opt.Observe(state.Transition{Image: "/srv/d", Event: state.OrderStop, From: state.Active, To: state.Closed, Err: onDisk{}})
	opt.Observe(state.Transition{Image: "/srv/d", Event: state.OrderStop, From: state.Active, To: state.Closed, Err: errors.New("x")})
	opt.Observe(state.Transition{Image: "/srv/d", Event: state.OrderStop, From: state.Active, To: state.Closed, Duration: 12345})
	opt.Observe(state.Transition{Image: "/srv/d", Event: state.OrderStop, From: state.Inactive, To: state.Closed}) // not shown
	opt.SlowDrain("/srv/d", "WRITE of 4096 at 0", 5001*time.Millisecond)
	log.Debug("not shown")
	log.Named("n").With(zap.String("b", "2"), zap.Int("a", 1)).Error("e", zap.Bool("c", true))
	want := `T info  image is active  image="/srv/my disk" from=activating to=active epoch=3 duration=1.23ms
T error inactivation failed, the image stays active  image=/srv/d from=inactivating to=active epoch=3 duration=12.35s error="no \"space\"\nleft"
T warn  image is inactive, but letting it go failed  image=/srv/d from=inactivating to=inactive epoch=0 duration=0s error=x
T warn  image is inactive  image=/srv/d from=inactivating to=inactive epoch=0 duration=0s error="all is on disk"
T warn  image is closed  image=/srv/d from=active to=closed epoch=0 duration=0s error="all is on disk"
T error image is closed  image=/srv/d from=active to=closed epoch=0 duration=0s error=x
T info  image is closed  image=/srv/d from=active to=closed epoch=0 duration=12µs
T warn  a transition waits for requests that storage has not finished  image=/srv/d oldest="WRITE of 4096 at 0" age=5s
T error n: e  c=true a=1 b=2
`
	got := regexp.MustCompile(`(?m)^\d\d:\d\d:\d\d\.\d\d\d `).ReplaceAllString(b.String(), "T ")
	if got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
}

func TestDatedConsole(t *testing.T) {
	var b bytes.Buffer
	log, err := NewLogger(zapcore.AddSync(&b), "info", "console", true)
	if err != nil {
		t.Fatal(err)
	}
	log.With(zap.Int("a", 1)).Info("line")
	date, rest, _ := strings.Cut(b.String(), " ")
	if at, err := time.Parse(time.RFC3339Nano, date); err != nil || time.Since(at) > time.Hour || rest != "info  line  a=1\n" {
		t.Errorf("got %s", b.String())
	}
}

func TestJSONLog(t *testing.T) {
	var b bytes.Buffer
	log, err := NewLogger(zapcore.AddSync(&b), "warn", "json", false)
	if err != nil {
		t.Fatal(err)
	}
	log.Info("not shown")
	log.Warn("shown", zap.Duration("duration", 1500*time.Millisecond))
	if got := b.String(); !strings.HasPrefix(got, `{"level":"warn","time":"`) || !strings.HasSuffix(got, `","msg":"shown","duration":1.5}`+"\n") {
		t.Errorf("got %s", got)
	}
	for _, bad := range [][2]string{{"loud", "json"}, {"", "json"}, {"info", "xml"}} {
		if _, err := NewLogger(zapcore.AddSync(&b), bad[0], bad[1], false); err == nil {
			t.Errorf("%q is accepted", bad)
		}
	}
}

// The end of an inactivation says what its gate left, and at debug level where
// the time went.
func TestTransitionDetails(t *testing.T) {
	var b bytes.Buffer
	log, err := NewLogger(zapcore.AddSync(&b), "debug", "console", false)
	if err != nil {
		t.Fatal(err)
	}
	opt := Observe(state.Options{Pacer: ioloop.NewPace(1 << 20)}, log)
	opt.Observe(state.Transition{
		Image: "/d", Event: state.Released, From: state.Inactivating, To: state.Inactive, Epoch: 3, Duration: 1500000,
		Steps: []state.StepTime{{Step: state.StepSyncAhead, Took: 1200000}, {Step: state.StepRelease, Took: 300000}},
	})
	opt.Observe(state.Transition{Image: "/d", Event: state.Published, From: state.Activating, To: state.Active, Epoch: 4})
	const want = `info  image is inactive  image=/d from=inactivating to=inactive epoch=3 duration=1.5ms syncs=0 left=0 steps="sync-ahead 1.2ms, release 300µs"
info  image is active  image=/d from=activating to=active epoch=4 duration=0s
`
	if got := regexp.MustCompile(`(?m)^\d\d:\d\d:\d\d\.\d\d\d `).ReplaceAllString(b.String(), ""); got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
	s := ioloop.PaceStats{Syncs: 3, Dirty: 4096, Slowed: 1.25, Delayed: 7}
	if f := aheadFields(s); len(f) != 4 || f[2].Key != "slowed" || f[2].Integer != 1250*int64(time.Millisecond) {
		t.Errorf("%v", f)
	}
}
