package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/nbd-export/nbd-export/bench"
	"github.com/nbd-export/nbd-export/control"
)

// newDemoCommand is nbd-export demo: the main job, shown in less than half a
// minute.
func newDemoCommand() *cobra.Command {
	var c bench.DemoConfig
	cmd := &cobra.Command{
		Use:   "demo",
		Short: "Hand an image back and forth between two exporters, and show that nothing is lost",
		Long: `Make a temporary image, start two exporters of it as processes of their own, and
hand its ownership from one to the other and back, again and again, while writers
write numbered, checksummed blocks through whichever owns it. Every write that
was acknowledged must be found, and the exporter that does not own the image must
have changed nothing. It needs no privileges and cleans up after itself.

Exit status is 1 if anything was lost.`,
		Example: `  nbd-export demo

  # more of it, on another file system
  nbd-export demo --handovers 200 --dir /mnt/scratch`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) > 0 {
				return usageError{fmt.Errorf("demo: unexpected argument %q", args[0])}
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, _ []string) error {
			if c.Handovers < 1 {
				return usageError{fmt.Errorf("demo: %d handovers: want at least 1", c.Handovers)}
			}
			return runDemo(cmd, c)
		},
	}
	cmd.Flags().IntVar(&c.Handovers, "handovers", 20, "`N` handovers in each direction")
	cmd.Flags().StringVar(&c.Dir, "dir", "", "`DIR` in which the temporary image is made (default the system's directory for such)")
	return cmd
}

func runDemo(cmd *cobra.Command, c bench.DemoConfig) error {
	ctx, stop := interruptible(cmd.Context())
	defer stop()
	line := newStatusLine(os.Stderr)
	if line != nil {
		c.Progress = func(p bench.DemoProgress) { line.show(p.String()) }
	}
	c.Start = startExporter
	r, err := bench.RunDemo(ctx, c)
	line.clear()
	switch {
	case ctx.Err() != nil:
		return errors.New("demo: interrupted")
	case err != nil:
		return fmt.Errorf("demo: %w", err)
	}
	if err := r.WriteTable(cmd.OutOrStdout()); err != nil {
		return err
	}
	if !r.OK() {
		return errors.New("demo: failed")
	}
	return nil
}

// exporterTimeout bounds how long an exporter may take to serve, and to end.
const exporterTimeout = 10 * time.Second

// startExporter runs this program's serve on image; its sockets are beside it.
func startExporter(ctx context.Context, name, image string, inactive bool) (*bench.Exporter, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	dir := filepath.Dir(image)
	socket, ctl := filepath.Join(dir, name+".sock"), filepath.Join(dir, name+".ctl")
	args := []string{"serve", "-f", "raw", "-k", socket, "--control", ctl}
	if inactive {
		args = append(args, "--inactive")
	}
	p := &process{cmd: exec.Command(self, append(args, image)...), ended: make(chan struct{})}
	p.cmd.Stderr = &p.log
	// A group of its own, so that an interrupt from the terminal reaches only us and
	// the exporters are ended in order; and they end when we are killed.
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGTERM}
	if err := p.cmd.Start(); err != nil {
		return nil, err
	}
	go p.wait()
	orders, err := p.answer(ctx, ctl)
	if err != nil {
		_ = p.kill()
		return nil, err
	}
	return &bench.Exporter{
		Name: name, PID: p.cmd.Process.Pid, Socket: socket,
		SetActive: func(ctx context.Context, active bool) error {
			return p.explain(orders.SetActive(ctx, active))
		},
		Stop: p.stop,
		Kill: p.kill,
	}, nil
}

// process is a running exporter.
type process struct {
	cmd   *exec.Cmd
	log   tail
	ended chan struct{} // closed when it has
	err   error         // how it ended; read after that
}

func (p *process) wait() {
	p.err = p.cmd.Wait()
	close(p.ended)
}

// answer waits until the control socket answers.
func (p *process) answer(ctx context.Context, ctl string) (*control.Client, error) {
	ctx, cancel := context.WithTimeout(ctx, exporterTimeout)
	defer cancel()
	for {
		orders, err := control.Dial(ctx, ctl)
		if err == nil {
			return orders, nil
		}
		select {
		case <-p.ended:
			return nil, p.explain(fmt.Errorf("it ended at once: %w", p.err))
		case <-ctx.Done():
			return nil, p.explain(err)
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// explain adds the last the exporter said to an error.
func (p *process) explain(err error) error {
	if err == nil {
		return nil
	}
	if said := p.log.last(); said != "" {
		return fmt.Errorf("%w (%s)", err, said)
	}
	return err
}

// stop ends the exporter in order.
func (p *process) stop(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, exporterTimeout)
	defer cancel()
	if err := p.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		return err
	}
	select {
	case <-p.ended:
		return p.explain(p.err)
	case <-ctx.Done():
		return p.explain(errors.New("it does not end"))
	}
}

// kill ends the exporter at once. It is no error if it has ended already.
func (p *process) kill() error {
	_ = p.cmd.Process.Kill()
	<-p.ended
	return nil
}

// tail keeps the end of what is written to it.
type tail struct {
	mu   sync.Mutex
	text []byte
}

func (t *tail) Write(b []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.text = append(t.text, b...)
	t.text = append(t.text[:0], t.text[max(0, len(t.text)-4096):]...)
	return len(b), nil
}

// last is the last line.
func (t *tail) last() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	text := bytes.TrimSpace(t.text)
	return strings.TrimSpace(string(text[bytes.LastIndexByte(text, '\n')+1:]))
}
