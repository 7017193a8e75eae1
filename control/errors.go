package control

import (
	"errors"
	"fmt"
)

// Class is the class of an Error; clients may rely on it, never on the text.
type Class string

// The classes of QMP.
const (
	GenericError    Class = "GenericError"
	CommandNotFound Class = "CommandNotFound"
	DeviceNotFound  Class = "DeviceNotFound"
	DeviceNotActive Class = "DeviceNotActive"
)

// Error is the answer to a command that failed, on the wire and in Client.
type Error struct {
	Class Class  `json:"class"`
	Desc  string `json:"desc"`
}

func (e *Error) Error() string { return e.Desc }

func generic(format string, a ...any) *Error {
	return &Error{GenericError, fmt.Sprintf(format, a...)}
}

// asError makes an answer of any error.
func asError(err error) *Error {
	if e, ok := errors.AsType[*Error](err); ok && e.Desc == err.Error() {
		return e
	}
	return &Error{GenericError, err.Error()}
}

// errStopping refuses orders to a process on its way out.
var errStopping = errors.New("the server is shutting down")

// also is err with what went wrong besides, if anything did, on one line.
func also(err, more error) error {
	if more == nil {
		return err
	}
	return fmt.Errorf("%w; %w", err, more)
}
