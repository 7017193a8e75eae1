package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"syscall"

	"github.com/spf13/cobra"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/nbd-export/nbd-export/control"
)

// forkedEnv has the descriptor on which a server that was started with --fork
// tells its parent that it serves. It is set for that server alone.
const forkedEnv = "NBD_EXPORT_FORKED"

func forkFlag(cmd *cobra.Command, fork *bool) {
	cmd.Flags().BoolVar(fork, "fork", false, "serve in the background: return when clients are served, or why that failed; the log goes on only into a file (--log-file, 2>>FILE)")
}

// inBackground runs the command line once more, as a process of a session of
// its own, until that serves. It returns what that has ended with, if it has.
func inBackground(signals *control.Signals) error {
	fail := func(err error) error { return fmt.Errorf("--fork: cannot start a process: %w", err) }
	r, w, err := os.Pipe()
	if err != nil {
		return fail(err)
	}
	defer r.Close()
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Args[0] = os.Args[0]
	cmd.Stderr, cmd.ExtraFiles = os.Stderr, []*os.File{w}
	cmd.Env = append(os.Environ(), forkedEnv+"=3")
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	err = cmd.Start()
	_ = w.Close()
	if err != nil {
		return fail(err)
	}
	serves := make(chan bool, 1)
	go func() {
		n, _ := r.Read(make([]byte, 1))
		serves <- n == 1
	}()
	select {
	case ok := <-serves:
		if ok {
			return cmd.Process.Release()
		}
	case <-signals.Stop():
		_ = cmd.Process.Signal(syscall.SIGTERM)
	}
	if exit, ok := errors.AsType[*exec.ExitError](cmd.Wait()); ok && exit.ExitCode() > 0 {
		return exitStatus(exit.ExitCode()) // it has said why
	}
	return errors.New("--fork: the server ended before clients were served")
}

// parent waits for a server that was started with --fork.
type parent struct{ pipe *os.File } // nil for none

// findParent takes the descriptor, so that programs that the server starts do
// not keep the parent waiting.
func findParent() parent {
	text, ok := os.LookupEnv(forkedEnv)
	_ = os.Unsetenv(forkedEnv)
	fd, err := strconv.Atoi(text)
	if !ok || err != nil {
		return parent{}
	}
	unix.CloseOnExec(fd)
	// The kernel calls it exe, after the path it was started by; ps, pgrep and
	// killall go by that name.
	_ = os.WriteFile("/proc/self/comm", []byte(filepath.Base(os.Args[0])), 0)
	return parent{os.NewFile(uintptr(fd), "parent")}
}

// exists reports whether the process is the one that is to serve.
func (p parent) exists() bool { return p.pipe != nil }

// release lets the parent end. What reads the log to its end, as ssh does and a
// program that waits for what the verb said, is not kept waiting: it ends here
// unless it is a file. With a log file last words go there too.
func (p parent) release(log *zap.Logger, file *control.LogFile) {
	if !p.exists() {
		return
	}
	if file != nil {
		if err := file.TakeStderr(); err != nil {
			log.Warn(err.Error())
		}
	} else if !stderrIsFile() {
		_ = log.Sync()
		if null, err := os.OpenFile(os.DevNull, os.O_WRONLY, 0); err == nil {
			_ = unix.Dup3(int(null.Fd()), 2, 0)
			_ = null.Close()
		}
	}
	_, _ = p.pipe.Write([]byte{1})
	_ = p.pipe.Close()
}

// stderrIsFile reports whether standard error is a regular file.
func stderrIsFile() bool {
	var st unix.Stat_t
	return unix.Fstat(2, &st) == nil && st.Mode&unix.S_IFMT == unix.S_IFREG
}
