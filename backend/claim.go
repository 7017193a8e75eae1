package backend

import "errors"

// AsOwner opens the image that o describes, whatever its format, as its owner
// does: it takes the locks and writes the owner record; then it calls change
// with the image's file, makes that durable and lets go in order. The error is a
// *LockError if somebody else has the image. After a failed sync the record goes
// on saying that the image was not let go.
func AsOwner(o Options, change func(f *File) error) error {
	o.Format = "raw"
	img, err := Open(o)
	if err != nil {
		return err
	}
	return errors.Join(img.asOwner(change), img.Close())
}

func (o *Owned) asOwner(change func(f *File) error) error {
	if err := o.Acquire(); err != nil {
		return err
	}
	err := o.Load(false)
	if err == nil {
		_, err = o.Claim(0)
	}
	if err != nil {
		o.Withdraw()
		return err
	}
	o.PublishActive()
	o.Retire()
	err = change(o.cur.Load().file)
	if SyncFailed(err) {
		return err
	}
	if settled := o.Settle(); settled != nil {
		return errors.Join(err, settled)
	}
	o.PublishInactive()
	return errors.Join(err, o.Release())
}
