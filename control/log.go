package control

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/buffer"
	"go.uber.org/zap/zapcore"

	"github.com/nbd-export/nbd-export/ioloop"
	"github.com/nbd-export/nbd-export/state"
)

// Observe fills in opt what logs a machine's transitions, one line for each.
func Observe(opt state.Options, log *zap.Logger) state.Options {
	pace, _ := opt.Pacer.(*ioloop.Pace)
	opt.Observe = func(t state.Transition) { logTransition(log, t, pace) }
	opt.SlowDrain = func(image, oldest string, age time.Duration) {
		log.Warn("a transition waits for requests that storage has not finished",
			zap.String("image", image), zap.String("oldest", oldest), zap.Duration("age", round(age)))
	}
	return opt
}

func logTransition(log *zap.Logger, t state.Transition, pace *ioloop.Pace) {
	level, msg := zapcore.InfoLevel, "image is "+t.To.String()
	switch t.Event {
	case state.ActivateFailed:
		level, msg = zapcore.ErrorLevel, "activation failed, the image stays inactive"
	case state.InactivateFailed:
		level, msg = zapcore.ErrorLevel, "inactivation failed, the image stays active"
	case state.SyncFailed:
		level, msg = zapcore.ErrorLevel, "a sync failed: acknowledged writes may be lost, and the image is not handed over as clean"
	case state.Fenced:
		level, msg = zapcore.ErrorLevel, "another process may own the image: nothing is written any more"
	case state.OrderAbandon:
		level, msg = zapcore.WarnLevel, "image given up: writes since the last flush may be lost"
	case state.Released:
		switch {
		case state.Durable(t.Err):
			level = zapcore.WarnLevel
		case t.Err != nil:
			level, msg = zapcore.WarnLevel, "image is inactive, but letting it go failed"
		}
	case state.OrderStop:
		switch {
		case state.Durable(t.Err):
			level = zapcore.WarnLevel
		case t.Err != nil:
			level = zapcore.ErrorLevel
		case t.From == state.Inactive: // nobody's ownership changes
			level = zapcore.DebugLevel
		}
	}
	fields := []zap.Field{
		zap.String("image", t.Image), zap.Stringer("from", t.From), zap.Stringer("to", t.To),
		zap.Uint64("epoch", t.Epoch), zap.Duration("duration", round(t.Duration)),
	}
	if pace != nil && t.From == state.Inactivating {
		fields = append(fields, aheadFields(pace.Stats())...)
	}
	if len(t.Steps) > 0 && log.Core().Enabled(zap.DebugLevel) {
		var steps []string
		for _, s := range t.Steps {
			steps = append(steps, fmt.Sprintf("%s %v", s.Step, round(s.Took)))
		}
		fields = append(fields, zap.String("steps", strings.Join(steps, ", ")))
	}
	if t.Err != nil {
		fields = append(fields, zap.Error(t.Err))
	}
	log.Log(level, msg, fields...)
}

// aheadFields say how often an image was synced ahead, how many bytes were left
// when its gate closed, and whether its writers were slowed for that.
func aheadFields(s ioloop.PaceStats) []zap.Field {
	fields := []zap.Field{zap.Int("syncs", s.Syncs), zap.Uint64("left", s.Dirty)}
	if s.Delayed > 0 {
		fields = append(fields, zap.Duration("slowed", round(time.Duration(s.Slowed*float64(time.Second)))), zap.Uint64("delayed", s.Delayed))
	}
	return fields
}

// round drops the digits that nobody reads.
func round(d time.Duration) time.Duration {
	switch {
	case d > time.Second:
		return d.Round(10 * time.Millisecond)
	case d > time.Millisecond:
		return d.Round(10 * time.Microsecond)
	}
	return d.Round(time.Microsecond)
}

// NewLogger makes the log of a process. level is debug, info, warn or error;
// format is console, lines for people, or json. dated lines for people have the date,
// as those of a file need; a terminal and the journal do without.
func NewLogger(w zapcore.WriteSyncer, level, format string, dated bool) (*zap.Logger, error) {
	lv, ok := map[string]zapcore.Level{
		"debug": zap.DebugLevel, "info": zap.InfoLevel, "warn": zap.WarnLevel, "error": zap.ErrorLevel,
	}[level]
	if !ok {
		return nil, fmt.Errorf("log level %q is none of debug, info, warn, error", level)
	}
	var enc zapcore.Encoder
	switch format {
	case "console":
		enc = &console{zapcore.NewMapObjectEncoder(), "15:04:05.000"}
		if dated {
			enc = &console{zapcore.NewMapObjectEncoder(), "2006-01-02T15:04:05.000Z07:00"}
		}
	case "json":
		enc = zapcore.NewJSONEncoder(zapcore.EncoderConfig{
			TimeKey: "time", LevelKey: "level", NameKey: "logger", MessageKey: "msg",
			EncodeTime: zapcore.RFC3339NanoTimeEncoder, EncodeLevel: zapcore.LowercaseLevelEncoder,
			EncodeDuration: zapcore.SecondsDurationEncoder, EncodeName: zapcore.FullNameEncoder,
		})
	default:
		return nil, fmt.Errorf("log format %q is neither console nor json", format)
	}
	if l, ok := w.(*Lines); ok {
		l.missing = func(n int64) []byte {
			b, err := enc.EncodeEntry(zapcore.Entry{Level: zap.WarnLevel, Time: time.Now(), Message: "log lines are missing here"},
				[]zap.Field{zap.Int64("lines", n)})
			if err != nil {
				return nil
			}
			defer b.Free()
			return slices.Clone(b.Bytes())
		}
	}
	return zap.New(zapcore.NewCore(enc, zapcore.Lock(w), lv)), nil
}

// console encodes an entry as a line for people:
//
//	10:02:03.456 info  image is active  image=/srv/disk epoch=3 duration=1.2ms
type console struct {
	*zapcore.MapObjectEncoder
	time string // layout
}

var lines = buffer.NewPool()

// Clone implements zapcore.Encoder.
func (c *console) Clone() zapcore.Encoder {
	d := &console{zapcore.NewMapObjectEncoder(), c.time}
	for k, v := range c.Fields {
		d.Fields[k] = v
	}
	return d
}

// EncodeEntry implements zapcore.Encoder.
func (c *console) EncodeEntry(e zapcore.Entry, fields []zap.Field) (*buffer.Buffer, error) {
	b := lines.Get()
	b.AppendTime(e.Time, c.time)
	_, _ = fmt.Fprintf(b, " %-5s ", e.Level)
	if e.LoggerName != "" {
		b.AppendString(e.LoggerName + ": ")
	}
	b.AppendString(e.Message)
	gap := "  "
	pair := func(k string, v any) {
		b.AppendString(gap + k + "=" + quoted(v))
		gap = " "
	}
	for _, f := range fields {
		one := zapcore.NewMapObjectEncoder()
		f.AddTo(one)
		if v, ok := one.Fields[f.Key]; ok {
			pair(f.Key, v)
		}
	}
	context := make([]string, 0, len(c.Fields))
	for k := range c.Fields {
		context = append(context, k)
	}
	slices.Sort(context)
	for _, k := range context {
		pair(k, c.Fields[k])
	}
	b.AppendByte('\n')
	return b, nil
}

// quoted is v as one word.
func quoted(v any) string {
	s := fmt.Sprint(v)
	if s == "" || strings.ContainsFunc(s, func(r rune) bool { return r <= ' ' || r == '"' || r == '=' || !strconv.IsPrint(r) }) {
		return strconv.Quote(s)
	}
	return s
}
