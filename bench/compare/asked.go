package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"syscall"
)

// What is measured in a program of its own, so that nothing waits for the scheduler of
// another: this program, started with an argument that says what for and one that says
// how, in JSON. It says when it is ready, and then answers each question, in JSON, on
// its standard input and output.

// asked is such a program. It belongs to one goroutine.
type asked struct {
	cmd  *exec.Cmd
	in   io.WriteCloser
	says *json.Decoder
	said tail // on standard error
}

// startAsked runs file, which is this program, and returns when it is ready. It is
// killed with ctx. If this fails nothing is left running. It is to be called on the
// main thread.
func startAsked(ctx context.Context, file, what string, how any) (*asked, error) {
	a := &asked{}
	var err error
	if a.cmd, err = ownProgram(ctx, file, what, how, &a.said); err != nil {
		return nil, err
	}
	if a.in, err = a.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	out, err := a.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := a.cmd.Start(); err != nil {
		return nil, err
	}
	a.says = json.NewDecoder(out)
	var ready struct{}
	if err := a.says.Decode(&ready); err != nil {
		a.stop()
		return nil, fmt.Errorf("%s: %w: %s", what, err, a.said.String())
	}
	return a, nil
}

// ownProgram is file, which is this program, to be started for what, with how in JSON.
// It ends with ctx, and with the thread that starts it; said is its standard error.
func ownProgram(ctx context.Context, file, what string, how any, said io.Writer) (*exec.Cmd, error) {
	arg, err := json.Marshal(how)
	if err != nil {
		return nil, err
	}
	cmd := exec.CommandContext(ctx, file, what, string(arg))
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	cmd.Stderr = said
	return cmd, nil
}

// ask has a question answered.
func (a *asked) ask(question, answer any) error {
	line, err := json.Marshal(question)
	if err == nil {
		_, err = a.in.Write(append(line, '\n'))
	}
	if err == nil {
		err = a.says.Decode(answer)
	}
	if err != nil {
		return fmt.Errorf("%s: %w", a.cmd.Args[1], err)
	}
	return nil
}

// stop ends it and waits for that.
func (a *asked) stop() {
	_ = a.in.Close()
	_ = a.cmd.Process.Kill()
	_ = a.cmd.Wait()
}

// answer is the other side: it says that it is ready, and answers what it is asked
// until there is no more.
func answer[T any](in io.Reader, out io.Writer, to func(question T) any) error {
	say, questions := json.NewEncoder(out), json.NewDecoder(in)
	var reply any = struct{}{}
	for {
		if err := say.Encode(reply); err != nil {
			return err
		}
		var question T
		if err := questions.Decode(&question); err != nil {
			if errors.Is(err, io.EOF) {
				return nil
			}
			return err
		}
		reply = to(question)
	}
}

// configure decodes the one argument that such a program has.
func configure(args []string, how any) error {
	if len(args) != 1 {
		return errors.New("want one argument, in JSON")
	}
	return json.Unmarshal([]byte(args[0]), how)
}
